"""The next token and the end are those of transformers."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
)

from expertd_inference.execution.choice_of_token import Choice, End, Finite
from expertd_inference.kernels.cpu.step import DTYPES, StepKernels, step_kernels
from expertstore.errors import PreconditionError


@pytest.fixture(scope="module")
def kernels() -> StepKernels:
    found = step_kernels()
    if found is None:
        pytest.skip("native code is not built here")
    return found


def logits_of(size: int, seed: int, dtype: torch.dtype) -> Tensor:
    # Steps of a half, so that many are equal and the first of them counts.
    values = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    return (values * 2).round().div(2).to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 33, 257, 50_304])  # less than a vector; with a rest
def test_the_likeliest(kernels: StepKernels, size: int, dtype: torch.dtype) -> None:
    places = sorted({0, size // 2, size - 1})
    special = [torch.nan, torch.inf, -torch.inf]
    for seed in range(3):
        logits = logits_of(size, seed, dtype)
        cases = [logits, torch.zeros_like(logits), torch.full_like(logits, -torch.inf)]
        for value, place in itertools.product(special, places):
            changed = logits.clone()
            changed[0, place] = value
            cases.append(changed)
            both = changed.clone()
            both[0, 0] = torch.inf
            cases.append(both)
        for case in cases:
            expected = torch.argmax(case.float(), dim=-1, keepdim=True)
            assert kernels.argmax(case) == expected.item()
            choose = Choice(LogitsProcessorList(), kernels, sample=False)
            if case.max().isfinite():
                assert torch.equal(choose(case, case), expected)
            else:
                with pytest.raises(PreconditionError, match="not finite"):
                    choose(case, case)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_scores_that_say_nothing(dtype: torch.dtype, sample: bool) -> None:
    """Neither greedily nor by chance is a token chosen, by whatever code."""
    name = str(dtype).removeprefix("torch.")
    for value in (torch.nan, torch.inf):
        logits = logits_of(100, 0, dtype)
        logits[0, 50] = value
        for kernels in (step_kernels(), None):
            choose = Choice(LogitsProcessorList(), kernels, sample=sample)
            with pytest.raises(PreconditionError, match=f"not finite numbers, computed in {name}"):
                choose(logits, logits)
        with pytest.raises(PreconditionError, match="not finite"):
            Finite(dtype)(logits, logits.float())
    # What is forbidden is not what is no number.
    logits[0, :50] = logits[0, 51:] = -torch.inf
    logits[0, 50] = 0.0
    assert Choice(LogitsProcessorList(), None, sample=sample)(logits, logits).item() == 50
    assert torch.equal(Finite(dtype)(logits, logits), logits)
    # And what the settings put in the place of it counts.
    logits[0, 7] = torch.nan
    removed = LogitsProcessorList([InfNanRemoveLogitsProcessor()])
    assert Choice(removed, None, sample=False)(logits, logits).item() == 7


def test_what_is_asked_for_is_asked_of_transformers(kernels: StepKernels) -> None:
    class Only(TopKLogitsWarper):  # type: ignore[misc] # transformers is untyped
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert scores.dtype == torch.float32
            return torch.full_like(scores, -torch.inf).index_fill(1, input_ids[0], 0.0)

    logits = logits_of(100, 0, torch.bfloat16)
    before = logits.clone()
    only = LogitsProcessorList([Only(top_k=1)])
    for sample in (True, False):
        choose = Choice(only, kernels, sample=sample)
        assert choose(torch.tensor([[7]]), logits).tolist() == [[7]]
    assert torch.equal(logits, before)
    drawn = []
    for found in (kernels, None):
        torch.manual_seed(3)
        choose = Choice(LogitsProcessorList(), found, sample=True)
        drawn.append([choose(logits, logits).item() for _ in range(20)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1, "drawn, and not the likeliest"


class Forbidden(StoppingCriteria):  # type: ignore[misc] # transformers is untyped
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids == 5).any(dim=1)


@pytest.mark.parametrize(
    "criteria",
    [
        [],
        [MaxLengthCriteria(4)],
        [MaxLengthCriteria(5), MaxLengthCriteria(3)],
        [MaxLengthCriteria(3), MaxLengthCriteria(5)],
        [MaxLengthCriteria(6, max_position_embeddings=2)],
        [MaxLengthCriteria(6, max_position_embeddings=6)],
        [EosTokenCriteria(3), MaxLengthCriteria(9)],
        [EosTokenCriteria([3, 4])],
        [EosTokenCriteria(3), Forbidden()],
        [Forbidden(), MaxLengthCriteria(4)],
    ],
)
def test_the_end(criteria: list[Any]) -> None:
    theirs = StoppingCriteriaList(criteria)
    ours = End(theirs)
    for length in range(1, 8):
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(0, 9, (1, length), generator=generator)
            assert ours(tokens) == bool(theirs(tokens, None).all()), tokens

"""Which token comes next, and whether it is the last: transformers' answers, without its detours.

For one sequence on the CPU the usual cases need no tensor of the whole vocabulary and none for a
yes or no. Whatever else is asked for is asked of transformers' own processors and criteria.
"""

from math import isfinite
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from expertd_inference.kernels.cpu.step import DTYPES, StepKernels
from expertstore.errors import PreconditionError


class Choice:
    """The next token, by the settings of a generation.

    Raises PreconditionError where the scores say nothing, since one of them is no number or
    infinite: the likeliest token is then the first one, whatever came before.
    """

    def __init__(
        self,
        processors: Any,  # noqa: ANN401 - a LogitsProcessorList
        kernels: StepKernels | None,
        *,
        sample: bool,
    ) -> None:
        self._processors = processors
        self._sample = sample
        self._kernels = None if sample or len(processors) else kernels

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:  # [1, T], [1, V] -> [1, 1]
        """After ``tokens``; ``logits`` are left as they are."""
        if (
            self._kernels is not None
            and logits.is_cpu
            and logits.dtype in DTYPES
            and logits.is_contiguous()
        ):
            index = self._kernels.argmax(logits)
            # What is no number counts as the largest.
            if not isfinite(logits[0, index].item()):
                raise _not_finite(logits)
            return torch.tensor([[index]])
        scores = self._processors(tokens, logits.to(torch.float32, copy=True))
        if not isfinite(scores.max().item()):
            raise _not_finite(logits)
        if self._sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
        return torch.argmax(scores, dim=-1, keepdim=True)


class Finite(LogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """For a loop of transformers, after its processors: the check that :class:`Choice` makes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` as they are, or PreconditionError."""
        if not bool(scores.amax(dim=-1).isfinite().all()):
            raise _not_finite(scores, self._dtype)
        return scores


def _not_finite(logits: Tensor, dtype: torch.dtype | None = None) -> PreconditionError:
    dtype = dtype or logits.dtype
    other = "float32" if dtype == torch.bfloat16 else "bfloat16"
    advice = (
        "verify the pack with `expertd verify`"
        if dtype == torch.float32
        else f"compute in {other} (--dtype {other}), and if that does not help verify the pack "
        "with `expertd verify`"
    )
    return PreconditionError(
        f"The model's scores for the next token are not finite numbers, computed in "
        f"{str(dtype).removeprefix('torch.')}, so no token can be chosen: values overflow, or "
        f"weights are damaged; {advice}."
    )


class End:
    """Whether a sequence is complete."""

    def __init__(self, criteria: Any) -> None:  # noqa: ANN401 - a StoppingCriteriaList
        self._max_tokens: int | None = None
        self._last: set[int] = set()
        self._others = type(criteria)()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._last |= set(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria and not _warns(criterion):
                length = criterion.max_length
                self._max_tokens = min(length, self._max_tokens or length)
            else:
                self._others.append(criterion)

    def __call__(self, tokens: Tensor) -> bool:  # [1, T]
        """Asked after each new token, of all so far."""
        if self._max_tokens is not None and tokens.shape[1] >= self._max_tokens:
            return True
        if self._last and int(tokens[0, -1]) in self._last:
            return True
        return bool(self._others) and bool(self._others(tokens, None).all())


def _warns(criterion: Any) -> bool:  # noqa: ANN401 - a MaxLengthCriteria
    """Whether it may say, once, that the model's positions are used up."""
    positions = criterion.max_position_embeddings
    return positions is not None and criterion.max_length > positions + 1

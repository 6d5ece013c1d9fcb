"""Tokens are chosen as transformers' processors have it, and by nothing of the neighbours."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expertd_inference.engine.nucleus import Candidates, candidates
from expertd_inference.engine.sampling import (
    Chosen,
    Sampler,
    Sampling,
    choose,
    prompt_logprobs,
)
from expertstore.errors import InvalidInputError, ScoresError

SIZE = 400


def scores_of(seed: int, spread: float, size: int = SIZE) -> torch.Tensor:
    return spread * torch.randn(1, size, generator=torch.Generator().manual_seed(seed))


def probabilities(drawn: Candidates, size: int = SIZE) -> np.ndarray[Any, np.dtype[np.float64]]:
    weights = drawn.weights.astype(np.float64)
    if drawn.tokens is None:
        return weights / weights.sum()
    full = np.zeros(size)
    full[drawn.tokens] = weights / weights.sum()
    return full


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.01, 0.5, 3.0, 20.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 50, SIZE, 2 * SIZE]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    num_masked=st.sampled_from([0, 10, SIZE - 3]),
)
def test_what_may_be_drawn_is_what_transformers_leaves(
    seed: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    num_masked: int,
) -> None:
    scores = scores_of(seed, spread)
    scores[:, :num_masked] = -torch.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    theirs = torch.softmax(warpers(torch.tensor([[1]]), scores.clone()), dim=-1)[0].double()
    ours = probabilities(candidates(scores[0].numpy(), temperature, top_k, top_p, min_p))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-4, atol=1e-7)


def test_those_that_equal_the_last_of_top_k_remain() -> None:
    scores = np.array([1, 3, 2, 2, 0, 2], np.float32)
    assert candidates(scores, 1.0, top_k=2).tokens.tolist() == [1, 2, 3, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wanted", "token"),
    [
        ({}, 0),
        ({"end_tokens": (0,)}, 0),
        ({"min_new_tokens": 5}, 0),
        ({"logit_bias": {0: -9.0}}, 1),
        ({"repetition_penalty": 9.0}, 1),
        ({"presence_penalty": 2.0}, 1),
        ({"frequency_penalty": 2.0}, 1),
        ({"allowed_tokens": (1, 2)}, 1),
        ({"banned_tokens": (0,)}, 1),
        ({"bad_words": ((0,),)}, 1),
        ({"end_tokens": (0,), "min_new_tokens": 5}, 1),
    ],
    ids=str,
)
def test_each_wish_counts_alone(wanted: dict[str, Any], token: int) -> None:
    sampling = Sampling(**wanted)
    # Token 0 is the likeliest, and was generated already.
    (chosen,) = choose(torch.tensor([[3.0, 2.0, 1.0]]), [Sampler(sampling, 0, 1)], [[2, 0]])
    assert isinstance(chosen, Chosen)
    assert chosen.token == token
    assert sampling.edits is (token != 0)


@pytest.mark.parametrize(("top_p", "num"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_as_many_as_just_come_to_top_p(top_p: float, num: int) -> None:
    """Of equal ones the first."""
    for top_k in (0, 4):
        drawn = candidates(np.zeros(4, np.float32), 1.0, top_k, top_p)
        assert drawn.tokens is not None
        assert drawn.tokens.tolist() == [*range(num)]


@pytest.mark.parametrize("wanted", [{"top_p": 0.9}, {"top_k": 700, "top_p": 0.99}, {"min_p": 0.1}])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])  # flat, and with many within each distance
def test_of_equals_the_first_comes_first(spread: float, wanted: dict[str, Any]) -> None:
    """In the order of a stable sort, on which it depends what a seed draws."""
    scores = (8 * scores_of(2, spread, 5000)[0]).round().numpy() / 8
    drawn = candidates(scores, 1.0, **wanted)
    assert drawn.tokens is not None
    order = np.argsort(-scores, kind="stable")
    assert drawn.tokens.tolist() == order[: len(drawn.tokens)].tolist()
    below = scores[drawn.tokens] - scores.max()
    np.testing.assert_allclose(drawn.weights, np.exp(below), rtol=1e-6)


@pytest.mark.parametrize("wanted", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_tokens_are_drawn_as_often_as_they_are_likely(wanted: dict[str, Any]) -> None:
    drawn = candidates(scores_of(1, 2.0)[0].numpy(), 1.0, **wanted)
    num_draws = 4000
    counts = np.zeros(SIZE)
    for at in range(num_draws):
        counts[drawn.draw((at + 0.5) / num_draws)] += 1
    # Draws at equal distances meet each within one of its share.
    assert np.abs(counts - num_draws * probabilities(drawn)).max() <= 1.01


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100.0])
def test_a_temperature_at_its_bounds(temperature: float) -> None:
    scores = scores_of(3, 5.0)[0].numpy()
    drawn = candidates(scores, temperature)
    assert np.isfinite(drawn.weights).all()
    if temperature < 1:
        assert drawn.draw(0.999) == scores.argmax()


def test_nothing_is_drawn_that_cannot_be() -> None:
    drawn = Candidates(None, np.array([0, 1, 0, 0], np.float32))
    assert {drawn.draw(x) for x in (0.0, 0.5, 1 - 2**-53)} == {1}


def edited(sampling: Sampling, scores: torch.Tensor, tokens: list[int], num_prompt: int) -> Any:
    sampler = Sampler(sampling, 0, num_prompt)
    for end in range(num_prompt, len(tokens)):  # as it is asked in the course of a text
        sampler._edited(scores[0].numpy(), tokens[:end])
    return sampler._edited(scores[0].numpy(), tokens)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.lists(st.integers(0, 30), min_size=2, max_size=80),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    bias=st.dictionaries(st.integers(0, 40), st.floats(-9, 9, width=32), max_size=4),
    words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), max_size=4),
)
def test_penalties_bias_and_bad_words_are_those_of_transformers(
    seed: int,
    tokens: list[int],
    penalty: float,
    bias: dict[int, float],
    words: list[tuple[int, ...]],
) -> None:
    scores = scores_of(seed, 3.0)
    processors = LogitsProcessorList()
    if bias:
        pairs = [[[token], float(value)] for token, value in bias.items()]
        processors.append(SequenceBiasLogitsProcessor(pairs))
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in words]))
    theirs = processors(torch.tensor([tokens]), scores.clone())[0].numpy()
    sampling = Sampling(repetition_penalty=penalty, logit_bias=bias, bad_words=tuple(words))
    np.testing.assert_allclose(
        edited(sampling, scores, tokens, num_prompt=len(tokens) // 2), theirs, rtol=1e-5
    )


def test_presence_and_frequency_count_what_was_generated() -> None:
    scores = scores_of(0, 1.0, 10)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    result = edited(sampling, scores, [1, 2, 3, 3, 2, 3], num_prompt=2)
    expected = scores[0].numpy().copy()
    expected[3] -= 0.5 + 3 * 0.25
    expected[2] -= 0.5 + 0.25
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_what_must_not_come() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    sampling = Sampling(
        banned_tokens=(0,), end_tokens=(1, 99), min_new_tokens=2, allowed_tokens=(0, 1, 3, 4)
    )
    sampler = Sampler(sampling, 0, 1)
    texts = [[7], [7, 3], [7, 3, 3]]
    chosen = [choose(scores, [sampler], [tokens])[0] for tokens in texts]
    assert [one.token for one in chosen if isinstance(one, Chosen)] == [3, 3, 1]


SAMPLINGS = [
    Sampling(),
    Sampling(logprobs=3),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=0.8, top_k=30, logprobs=0),
    Sampling(temperature=1.5, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_choice_depends_on_no_neighbour(dtype: torch.dtype) -> None:
    chance = random.Random(0)
    num_rows = 3 * len(SAMPLINGS)
    logits = torch.randn(num_rows, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = [chance.choices(range(5000), k=chance.randint(1, 50)) for _ in range(num_rows)]

    def samplers() -> list[Sampler]:
        return [Sampler(SAMPLINGS[at % len(SAMPLINGS)], at % 5, 1) for at in range(num_rows)]

    together = choose(logits, samplers(), tokens)
    alone = [
        choose(logits[at : at + 1], [one], [tokens[at]])[0] for at, one in enumerate(samplers())
    ]
    assert together == alone
    again = samplers()
    for at, one in enumerate(again):  # as after a preemption: asked before, of fewer tokens
        for end in range(1, len(tokens[at])):
            choose(logits[at : at + 1], [one], [tokens[at][:end]])
    assert choose(logits, again, tokens) == alone


def test_seeds_and_positions_draw_on_their_own() -> None:
    flat = torch.zeros(1, 50_000)
    wanted = Sampling(temperature=1.0)
    drawn = {
        choose(flat, [Sampler(wanted, seed, 1)], [[0] * position])[0]
        for seed in (0, 1, 2**64 - 1)
        for position in range(1, 30)
    }
    assert len(drawn) > 80


def test_the_first_of_equals_is_chosen() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        row = torch.zeros(1, 300, dtype=dtype)
        row[0, [70, 200, 299]] = 4.0
        assert choose(row, [Sampler(Sampling(), 0, 1)], [[1]]) == [Chosen(70)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_scores_that_say_nothing_are_that_sequences_error(value: float, sampling: Sampling) -> None:
    logits = torch.randn(3, 500, dtype=torch.bfloat16)
    logits[1, 300] = value
    results = choose(logits, [Sampler(sampling, 0, 1) for _ in range(3)], [[1]] * 3)
    assert [type(one) for one in results] == [Chosen, ScoresError, Chosen]
    assert "--dtype float32" in str(results[1])


def test_settings_that_leave_no_token_are_that_sequences_error() -> None:
    nothing = Sampling(allowed_tokens=(5,), bad_words=((5,),))
    results = choose(
        torch.randn(2, 50), [Sampler(one, 0, 1) for one in (nothing, Sampling())], [[1]] * 2
    )
    assert isinstance(results[0], InvalidInputError)
    assert "No token may come next" in str(results[0])
    assert isinstance(results[1], Chosen)


def test_what_is_masked_by_the_model_is_no_error() -> None:
    row = torch.full((1, 50), -torch.inf)
    row[0, 9] = -3.0
    for sampling in SAMPLINGS:
        assert choose(row, [Sampler(sampling, 0, 1)], [[1]])[0].token == 9  # type: ignore[union-attr]


@pytest.mark.parametrize("sampling", [Sampling(logprobs=4), Sampling(temperature=2.0, logprobs=4)])
def test_logprobs_are_by_the_models_own_scores(sampling: Sampling) -> None:
    logits = scores_of(5, 2.0)
    expected = logits.double().log_softmax(-1)[0]
    chosen = choose(logits, [Sampler(sampling, 3, 1)], [[1]])[0]
    assert isinstance(chosen, Chosen)
    assert chosen.logprob == pytest.approx(expected[chosen.token].item(), abs=1e-5)
    values, tokens = expected.topk(4)
    assert [token for token, _ in chosen.top_logprobs] == tokens.tolist()
    assert [value for _, value in chosen.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)
    if not sampling.temperature:
        assert chosen.logprob == chosen.top_logprobs[0][1]  # the very same number


def test_logprobs_of_a_prompt() -> None:
    logits = torch.cat([scores_of(seed, 2.0) for seed in range(3)])
    found = prompt_logprobs(logits, [5, 6, 7], num_top=2)
    expected = logits.double().log_softmax(-1)
    for row, target, (logprob, top) in zip(expected, [5, 6, 7], found, strict=True):
        assert logprob == pytest.approx(row[target].item(), abs=1e-5)
        assert [token for token, _ in top] == row.topk(2).indices.tolist()

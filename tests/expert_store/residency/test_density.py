"""Hit density: what is learned of use, and how soon a layer's turn comes."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.residency.density import Density

NUM_LAYERS, WIDTH, PER_TOKEN = 4, 8, 2


def make() -> Density:
    return Density([WIDTH] * NUM_LAYERS, [PER_TOKEN] * NUM_LAYERS)


def entries(layer: int, *experts: int) -> np.ndarray:
    return np.array([layer * WIDTH + expert for expert in experts], np.int64)


def touch_token(policy: Density, *experts: int, stream: int = 0, layers: int = NUM_LAYERS) -> None:
    for layer in range(layers):
        policy.touch(entries(layer, *experts), stream)


routing = st.lists(
    st.lists(st.sets(st.integers(0, WIDTH - 1), min_size=1), min_size=NUM_LAYERS,
             max_size=NUM_LAYERS), min_size=1, max_size=12,
)  # fmt: skip


@given(routing, st.integers(0, NUM_LAYERS - 1), st.integers(0, WIDTH - 1))
def test_an_access_never_makes_an_expert_worth_less(tokens: list, layer: int, expert: int) -> None:
    one, other = make(), make()
    for number, token in enumerate(tokens):
        for index, used in enumerate(token):
            more = used | {expert} if number == len(tokens) - 1 and index == layer else used
            one.touch(entries(index, *sorted(used)))
            other.touch(entries(index, *sorted(more)))
    # What both have learned differs by that access, and here only its own effect matters.
    other._weights, other._weights_at = one._weights, other._num_touches
    one._weights_at = one._num_touches
    entry = entries(layer, expert)
    if len(tokens[-1][layer]) < PER_TOKEN:  # a longer visit counts as a prompt's, with less each
        assert other.of(entry)[0] >= one.of(entry)[0] - 1e-9


@given(routing)
def test_no_weight_is_negative(tokens: list) -> None:
    policy = make()
    for token in tokens:
        for layer, used in enumerate(token):
            policy.touch(entries(layer, *sorted(used)))
            policy.of(entries(0, 0))
    assert (policy._weights >= 0).all()


@given(routing, st.integers(0, 2**32))
def test_batches_change_nothing_but_when_it_is_told(tokens: list, seed: int) -> None:
    """One layer at a time, or as many as came since the daemon last looked."""
    singly, batched = make(), make()
    rng, pending = random.Random(seed), []
    for token in tokens:
        for layer, used in enumerate(token):
            row = entries(layer, *sorted(used))
            singly.touch(row)
            singly._learn()
            pending.append(row)
            if rng.random() < 0.3:
                batched.touch(np.concatenate(pending))
                pending.clear()
    if pending:
        batched.touch(np.concatenate(pending))
    batched._learn()
    assert batched._features == pytest.approx(singly._features, rel=1e-4, abs=1e-6)
    assert batched._last.tolist() == singly._last.tolist()


def test_it_learns_whether_the_last_token_or_the_long_run_tells_more() -> None:
    rng = random.Random(1)
    favourites, repeats = make(), make()
    used = [0, 1]
    for _ in range(200):
        # Experts 0 to 3 are always likelier than the others, whatever the last token used.
        for layer in range(NUM_LAYERS):
            favourites.touch(entries(layer, *sorted(rng.sample(range(4), 2))))
        favourites.touch(entries(0, 7)) if rng.random() < 0.1 else None
        # What one token used the next uses again, mostly, and all experts have their time.
        used = used if rng.random() < 0.9 else sorted(rng.sample(range(WIDTH), 2))
        touch_token(repeats, *used)
    favourites.touch(entries(3, 6, 7))  # a surprise, just now
    assert favourites.of(entries(3, 0, 1, 2, 3)).min() > favourites.of(entries(3, 6, 7)).max()
    absent = [expert for expert in range(WIDTH) if expert not in used]
    assert repeats.of(entries(3, *used)).min() > 2 * repeats.of(entries(3, *absent)).max()


def test_of_two_alike_the_one_whose_layer_comes_sooner_is_worth_more() -> None:
    policy = make()
    for _ in range(10):
        touch_token(policy, 0, 1)
    touch_token(policy, 0, 1, layers=2)
    # Layers 0 and 1 had their turn; 2 is next, then 3, then 0 again.
    worth = [policy.of(entries(layer, 0))[0] for layer in (2, 3, 0, 1)]
    assert policy._tokens_to_visit().tolist() == [0.75, 1.0, 0.25, 0.5]
    assert worth[0] > worth[1] > worth[3]


def test_a_prompt_that_goes_token_by_token_is_expected_at_its_layer_again() -> None:
    policy = make()
    policy.touch(entries(1, 0, 1))
    policy.touch(entries(1, 2, 3))
    assert policy._tokens_to_visit().tolist() == [1.0, 0.25, 0.5, 0.75]


def test_streams_are_expected_each_where_it_is() -> None:
    policy = make()
    policy.touch(entries(0, 0, 1), stream=1)
    policy.touch(entries(2, 0, 1), stream=2)
    # Two streams share the tokens: a stream's next layer takes two layers' time.
    assert policy._tokens_to_visit().tolist() == [1.0, 0.5, 1.0, 0.5]


def test_streams_in_step_count_as_often_as_they_are() -> None:
    policy = make()
    for stream in range(4):
        policy.touch(entries(0, 0, 1), stream)
    assert policy._tokens_to_visit().tolist() == [1.0, 0.25, 0.5, 0.75]


def test_a_stream_that_stands_still_is_expected_nowhere() -> None:
    policy = make()
    policy.touch(entries(2, 0, 1), stream=1)
    for _ in range(12):
        touch_token(policy, 0, 1, stream=2)
    assert policy._tokens_to_visit().tolist() == [0.25, 0.5, 0.75, 1.0]


def test_streams_that_come_and_go_leave_nothing() -> None:
    policy = make()
    for stream in range(10):
        touch_token(policy, 0, 1, stream=stream)
        policy.leave(stream)
    assert not policy._streams


def test_layers_may_differ() -> None:
    policy = Density([2, 5, 3], [1, 2, 1])
    for _ in range(20):
        policy.touch(np.array([0, 2, 3, 9]))
    assert policy.coldest(np.arange(10)).tolist()[-4:] != []
    assert set(policy.coldest(np.arange(10)).tolist()[-4:]) == {0, 2, 3, 9}

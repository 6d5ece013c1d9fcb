"""Which number of layers is chosen: always one of them, the fastest, and seldom another."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_inference.experts.foresight import BLOCK_STEPS, MARGIN, ROUNDS, Foresight

CHOICES = (0, 1, 2)
TRIAL = BLOCK_STEPS * ROUNDS * len(CHOICES)

costs = st.fixed_dictionaries({choice: st.floats(1e-4, 10) for choice in CHOICES})


def run(foresight: Foresight, cost: Callable[[int], float], steps: int) -> list[int]:
    """The choice of each step."""
    chosen = []
    for _ in range(steps):
        chosen.append(foresight.num_layers)
        foresight.step_took(cost(chosen[-1]))
    return chosen


@given(costs, st.integers(1, 600))
def test_it_is_always_one_of_the_choices_and_each_is_tried_alike(
    cost: dict[int, float], steps: int
) -> None:
    foresight = Foresight(CHOICES)
    chosen = run(foresight, cost.__getitem__, steps)
    assert set(chosen) <= set(CHOICES)
    tried = Counter(chosen[:TRIAL])
    if steps >= TRIAL:
        assert set(tried.values()) == {TRIAL // len(CHOICES)}
        assert foresight.why.startswith("a token took ")


@given(costs)
def test_after_one_trial_it_is_the_fastest_within_the_margin(cost: dict[int, float]) -> None:
    foresight = Foresight(CHOICES)
    run(foresight, cost.__getitem__, TRIAL)
    assert foresight.settled
    assert MARGIN * cost[foresight.num_layers] <= min(cost.values())
    if MARGIN * cost[0] <= min(cost.values()):
        assert foresight.num_layers == 0, "hints are what has to prove itself"


@given(costs, st.integers(0, ROUNDS * len(CHOICES) - 1), st.floats(0, 1e3))
def test_one_pause_of_the_host_decides_nothing(
    cost: dict[int, float], paused: int, pause: float
) -> None:
    undisturbed, foresight = Foresight(CHOICES), Foresight(CHOICES)
    run(undisturbed, cost.__getitem__, TRIAL)
    for step in range(TRIAL):
        late = pause if step == paused * BLOCK_STEPS + 2 else 0.0
        foresight.step_took(cost[foresight.num_layers] + late)
    assert foresight.num_layers == undisturbed.num_layers


@given(costs)
def test_trials_take_a_tenth_of_the_steps_and_fewer_and_fewer(cost: dict[int, float]) -> None:
    foresight = Foresight(CHOICES)
    chosen = run(foresight, cost.__getitem__, 100 * TRIAL)
    other = [choice != foresight.num_layers for choice in chosen]
    assert sum(other[: 10 * TRIAL]) <= 2 * TRIAL
    assert sum(other) <= 4 * TRIAL


@given(st.floats(0, 0.02), st.integers(0, 1 << 32))
def test_what_hardly_differs_is_not_switched_between(noise: float, seed: int) -> None:
    foresight, draw = Foresight(CHOICES), random.Random(seed)
    chosen = run(foresight, lambda _: 1 + noise * (draw.random() - 0.5), 50 * TRIAL)
    settled = chosen[TRIAL:]
    assert foresight.num_layers == 0
    assert settled.count(0) > 0.9 * len(settled)


@pytest.mark.parametrize("best", CHOICES)
def test_it_follows_what_changes(best: int) -> None:
    foresight = Foresight(CHOICES)
    run(foresight, lambda choice: 1.0 + (choice == best), 3 * TRIAL)
    assert foresight.num_layers != best
    run(foresight, lambda choice: 2.0 - (choice == best), 200 * TRIAL)
    assert foresight.num_layers == best


def test_what_a_choice_left_to_the_next_counts_for_neither() -> None:
    """The first step of a block finds the records that the block before has brought."""
    foresight, last = Foresight((0, 1)), 0
    for _ in range(2 * BLOCK_STEPS * ROUNDS):
        choice = foresight.num_layers
        foresight.step_took(1.0 if choice == last else 100.0 if choice else 0.0)
        last = choice
    assert foresight.num_layers == 0
    assert foresight.why == "a token took 1e+03 ms with 0 and 1e+03 ms with 1"


def test_a_number_that_is_told_is_obeyed() -> None:
    foresight = Foresight((3,))
    assert run(foresight, lambda _: 1.0, 500) == [3] * 500
    assert repr(foresight) == "Foresight(3 layers ahead: as told)"
    with pytest.raises(ValueError, match="nothing"):
        Foresight(())

"""What every policy promises to the slots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.residency import POLICIES, Policy, make_policy
from expertd.settings.policy_names import PolicyName

NUM_EXPERTS = [4, 3, 4]
PER_TOKEN = [2, 1, 1]
NUM, TOUCHES = sum(NUM_EXPERTS), sum(PER_TOKEN)
ALL = np.arange(NUM)

batches = st.lists(
    st.tuples(st.lists(st.integers(0, NUM - 1), max_size=30), st.integers(0, 3)), max_size=8
)
policies = st.sampled_from(sorted(POLICIES))
each_policy = pytest.mark.parametrize("name", sorted(POLICIES))


def entries(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def make(name: str) -> Policy:
    return make_policy(name, NUM_EXPERTS, PER_TOKEN)


def test_each_name_has_its_policy() -> None:
    assert sorted(POLICIES) == sorted(PolicyName)
    assert all(policy.name == name for name, policy in POLICIES.items())


@given(policies, batches, st.sets(st.integers(0, NUM - 1)))
def test_the_candidates_come_back_each_once_the_least_worth_first(
    name: str, touched: list, candidates: set
) -> None:
    policy = make(name)
    for numbers, stream in touched:
        policy.touch(entries(*numbers), stream)
    coldest = policy.coldest(entries(*candidates))
    assert set(coldest.tolist()) == candidates
    assert len(coldest) == len(candidates)
    values = policy.of(coldest).tolist()
    assert values == sorted(values)
    assert np.isfinite(values).all()
    assert min(values, default=0.0) >= 0


@each_policy
def test_nothing_changes_while_nothing_happens(name: str) -> None:
    policy = make(name)
    policy.touch(entries(1, 1, 2))
    before = policy.of(ALL)
    policy.touch(entries())
    assert (policy.of(ALL) == before).all()


@given(policies, st.floats(0.1, 1000))
def test_others_work_cools_but_keeps_the_order(name: str, tokens: float) -> None:
    policy = make(name)
    policy.touch(entries(0, 0, 5, 8, 0, 1, 5, 9))
    order, before = policy.coldest(ALL).tolist(), policy.of(ALL)
    policy.pass_time(tokens)
    after = policy.of(ALL)
    assert (after[before > 0] < before[before > 0]).all()
    assert policy.coldest(ALL).tolist() == order


@each_policy
def test_what_a_working_model_uses_is_worth_more_than_what_an_idle_one_used(name: str) -> None:
    working, idle = make(name), make(name)
    for policy in (working, idle):
        for _ in range(20):
            policy.touch(entries(0, 1, 4, 7))
    for _ in range(60):
        working.touch(entries(0, 1, 4, 7))
        idle.pass_time(working.take_tokens())
    assert idle.of(entries(0, 1, 4, 7)).max() < working.of(entries(0, 1, 4, 7)).min()


@each_policy
def test_what_the_last_tokens_used_is_not_idle_however_much_others_work(name: str) -> None:
    policy = make(name)
    for batch in ((0, 0, 0, 0), (1, 2, 1, 2), (3, 3, 3, 3)):
        policy.touch(entries(*batch))
    policy.pass_time(10_000)
    assert policy.dispensable(entries(0, 1, 2, 3), 1).tolist() == [0, 1, 2]
    assert policy.dispensable(entries(0, 1, 2, 3), 2).tolist() == [0]
    assert policy.dispensable(entries(0, 1, 2, 3), 3).tolist() == []


LAYERS = 8


def passing(name: str, *layers: int) -> Policy:
    """Eight layers of one expert, and a stream that has just been in each of ``layers``."""
    policy = make_policy(name, [1] * LAYERS, [1] * LAYERS)
    for stream, layer in enumerate(layers):
        policy.touch(entries(*[(layer + step) % LAYERS for step in range(1, LAYERS + 1)]), stream)
    return policy


@each_policy
def test_a_step_can_spare_the_layers_that_it_has_passed(name: str) -> None:
    layers = np.arange(LAYERS)
    assert passing(name, 5).dispensable(layers, 2).tolist() == [2, 3, 4]
    assert passing(name, 1).dispensable(layers, 2).tolist() == [0, 6, 7]
    assert passing(name, 5, 4).dispensable(layers, 3).tolist() == [2, 3], "of both"
    assert passing(name, 5, 1).dispensable(layers, 3).tolist() == []
    left = passing(name, 5, 1)
    left.leave(1)
    assert left.dispensable(layers, 3).tolist() == [2, 3, 4]
    still = passing(name, 1)
    for _ in range(3):
        still.touch(np.roll(layers, 2), 1)  # ends in layer 5
    assert still.dispensable(layers, 2).tolist() == [2, 3, 4], "it stands still in layer 1"


@given(policies, st.lists(st.integers(0, LAYERS - 1), max_size=4), st.integers(1, 6))
def test_what_comes_next_is_never_spared(name: str, at: list[int], num_tokens: int) -> None:
    policy = passing(name, *at)
    spared = policy.dispensable(np.arange(LAYERS), num_tokens).tolist()
    for layer in at[-num_tokens:]:
        assert layer not in spared
        assert (layer + 1) % LAYERS not in spared


@each_policy
def test_tokens_are_taken_once(name: str) -> None:
    policy = make(name)
    policy.touch(entries(0, 1))
    policy.pass_time(7)
    assert [policy.take_tokens(), policy.take_tokens()] == [0.5, 0.0]


@each_policy
def test_an_expected_record_is_neither_cold_nor_idle(name: str) -> None:
    policy = make(name)
    for _ in range(4):
        policy.touch(entries(0, 1, 4, 7))
    policy.expect(8)
    assert policy.coldest(entries(8, 9)).tolist() == [9, 8]
    assert policy.dispensable(entries(8, 9), 2).tolist() == [9]


@each_policy
def test_endless_work_ends_in_no_error(name: str) -> None:
    policy = make(name)
    policy.touch(entries(0))
    policy.pass_time(1e12)
    for _ in range(100):
        policy.touch(np.full(16384, 10))
    assert np.isfinite(policy.of(ALL)).all()
    assert policy.coldest(ALL).tolist()[-1] == 10


def test_lru_evicts_in_the_order_of_last_use_within_a_batch_too() -> None:
    policy = make("lru")
    policy.touch(entries(3, 1, 2, 3, 0))
    assert policy.coldest(entries(0, 1, 2, 3)).tolist() == [1, 2, 3, 0]


def test_lru_counts_time_that_models_share() -> None:
    early, late = make("lru"), make("lru")
    early.touch(entries(0, 1, 4, 7))
    late.pass_time(early.take_tokens())
    late.touch(entries(0, 1, 4, 7))
    early.pass_time(late.take_tokens())
    assert early.of(entries(7)) < late.of(entries(0))


def test_lru_per_layer_takes_from_the_layer_that_has_most() -> None:
    policy = make("lru-per-layer")
    policy.touch(entries(7, 0, 1, 2, 3, 4))  # the oldest is the only one of its layer
    assert policy.coldest(entries(0, 1, 2, 3, 4, 7)).tolist()[:3] == [0, 1, 2]

"""Heat: what is used stays, what is not fades with work done and not with time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.residency import HALF_LIFE_TOKENS, Heat

NUM = 6
PER_TOKEN = 4
ALL = np.arange(NUM)

batches = st.lists(st.lists(st.integers(0, NUM - 1), max_size=30), max_size=8)


def _array(entries: list[int]) -> np.ndarray:
    return np.array(entries, np.int64)


@given(batches)
def test_the_coldest_comes_first_and_among_equals_the_longest_unused(touched: list) -> None:
    heat, last, now = Heat(NUM, PER_TOKEN), [0.0] * NUM, 0.0
    for entries in touched:
        heat.touch(_array(entries))
        now += len(entries) / PER_TOKEN
        for entry in entries:
            last[entry] = now
    order = heat.coldest(ALL).tolist()
    assert sorted(order) == ALL.tolist()
    keys = [(heat.of(ALL)[entry], last[entry]) for entry in order]
    assert keys == sorted(keys)


@given(batches, st.integers(0, NUM - 1))
def test_a_touch_weighs_half_after_a_half_life_of_touches(touched: list, entry: int) -> None:
    """Heat is the sum of the touches, each halved once per half-life of touches since."""
    heat, expected, half_life = Heat(NUM, PER_TOKEN), 0.0, PER_TOKEN * HALF_LIFE_TOKENS
    for entries in touched:
        heat.touch(_array(entries))
        expected = expected * 0.5 ** (len(entries) / half_life) + entries.count(entry)
    assert heat.of(ALL)[entry] == pytest.approx(expected)


def test_nothing_fades_while_nothing_happens() -> None:
    heat = Heat(NUM, PER_TOKEN)
    heat.touch(_array([1, 1, 2]))
    before = heat.of(ALL)
    heat.touch(_array([]))
    assert (heat.of(ALL) == before).all()


def test_frequent_use_outweighs_one_recent_use() -> None:
    heat = Heat(NUM, PER_TOKEN)
    for _ in range(5):
        heat.touch(_array([0, 1, 0, 1]))
    heat.touch(_array([2, 3, 2, 3]))
    assert heat.coldest(_array([0, 2])).tolist() == [2, 0]


def test_what_was_once_hot_fades_behind_what_is_used_now() -> None:
    heat = Heat(NUM, PER_TOKEN)
    for _ in range(50):
        heat.touch(_array([0, 0, 0, 0]))
    for _ in range(3 * HALF_LIFE_TOKENS):
        heat.touch(_array([1, 1, 1, 1]))
    assert heat.coldest(_array([0, 1])).tolist() == [0, 1]


@given(st.floats(0.1, 1000))
def test_others_work_cools_but_keeps_the_order(tokens: float) -> None:
    heat = Heat(NUM, PER_TOKEN)
    heat.touch(_array([0, 0, 0, 1, 1, 2]))
    order, before = heat.coldest(ALL).tolist(), heat.of(ALL)
    heat.pass_time(tokens)
    assert heat.of(ALL) == pytest.approx(before * 0.5 ** (tokens / HALF_LIFE_TOKENS))
    assert heat.coldest(ALL).tolist() == order


def test_what_the_last_tokens_used_is_not_idle_however_much_others_work() -> None:
    heat = Heat(NUM, PER_TOKEN)
    heat.touch(_array([0, 0, 0, 0]))
    heat.touch(_array([1, 2, 1, 2]))
    heat.touch(_array([3, 3, 3, 3]))
    heat.pass_time(10_000)
    assert heat.idle_since(_array([0, 1, 2, 3]), 1).tolist() == [0, 1, 2]
    assert heat.idle_since(_array([0, 1, 2, 3]), 2).tolist() == [0]
    assert heat.idle_since(_array([0, 1, 2, 3]), 3).tolist() == []


def test_tokens_are_taken_once() -> None:
    heat = Heat(NUM, PER_TOKEN)
    heat.touch(_array([0, 1]))
    heat.pass_time(7)
    assert [heat.take_tokens(), heat.take_tokens()] == [0.5, 0.0]


def test_an_expected_record_is_neither_cold_nor_idle() -> None:
    heat = Heat(NUM, PER_TOKEN)
    for _ in range(4):
        heat.touch(_array([0, 0, 0, 0]))
    heat.expect(5)
    assert heat.coldest(_array([4, 5])).tolist() == [4, 5]
    assert heat.idle_since(_array([4, 5]), 2).tolist() == [4]


def test_endless_work_ends_at_zero_heat_and_not_in_an_error() -> None:
    heat = Heat(NUM, PER_TOKEN)
    heat.touch(_array([0]))
    heat.pass_time(1e12)
    assert heat.of(ALL).tolist() == [0.0] * NUM

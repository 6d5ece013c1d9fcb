"""Frequency with decay: what is used stays, what is not fades with work done."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.residency import HALF_LIFE_TOKENS
from expertd.residency.aged import Aged

NUM = 6
PER_TOKEN = 4

batches = st.lists(st.lists(st.integers(0, NUM - 1), max_size=30), max_size=8)


def make() -> Aged:
    return Aged([NUM], [PER_TOKEN])


def entries(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@given(batches, st.integers(0, NUM - 1))
def test_a_touch_weighs_half_after_a_half_life_of_touches(touched: list, entry: int) -> None:
    """Heat is the sum of the touches, each halved once per half-life of touches since."""
    heat, expected, half_life = make(), 0.0, PER_TOKEN * HALF_LIFE_TOKENS
    for numbers in touched:
        heat.touch(entries(*numbers))
        expected = expected * 0.5 ** (len(numbers) / half_life) + numbers.count(entry)
    assert heat.of(entries(entry))[0] == pytest.approx(expected)


def test_frequent_use_outweighs_one_recent_use() -> None:
    heat = make()
    for _ in range(5):
        heat.touch(entries(0, 1, 0, 1))
    heat.touch(entries(2, 3, 2, 3))
    assert heat.coldest(entries(0, 2)).tolist() == [2, 0]


def test_what_was_once_hot_fades_behind_what_is_used_now() -> None:
    heat = make()
    for _ in range(50):
        heat.touch(entries(0, 0, 0, 0))
    for _ in range(3 * HALF_LIFE_TOKENS):
        heat.touch(entries(1, 1, 1, 1))
    assert heat.coldest(entries(0, 1)).tolist() == [0, 1]


@given(st.floats(0.1, 1000))
def test_others_work_ages_as_much_as_ones_own(tokens: float) -> None:
    heat = make()
    heat.touch(entries(0, 0, 0, 1, 1, 2))
    before = heat.of(np.arange(NUM))
    heat.pass_time(tokens)
    assert heat.of(np.arange(NUM)) == pytest.approx(before * 0.5 ** (tokens / HALF_LIFE_TOKENS))

"""Replay: the policies are counted as the daemon would, and nobody beats the optimum."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.residency import POLICIES, make_policy
from expertd.traces.replay import Trace, replay, replay_optimum
from expertstore.trace import TraceModel

LAYERS, EXPERTS = 3, 4
MODEL = TraceModel((EXPERTS,) * LAYERS, (2,) * LAYERS, tuple(range(LAYERS)))

Rows = list[list[int]]

rows_of_steps = st.lists(
    st.lists(
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=2, unique=True),
        min_size=LAYERS, max_size=LAYERS,
    ), min_size=1, max_size=25,
)  # fmt: skip


def trace(rows: Rows, num_prefill: int = 0) -> Trace:
    return Trace(
        MODEL,
        np.array([entry for row in rows for entry in row]),
        np.cumsum([0, *map(len, rows)]),
        np.arange(len(rows)) >= num_prefill,
        np.zeros(len(rows), np.int64),
        0,
    )


def flatten(steps: list) -> Rows:
    return [
        [layer * EXPERTS + expert for expert in row]
        for step in steps
        for layer, row in enumerate(step)
    ]


def naive_lru(rows: Rows, num_slots: int) -> float:
    """Hits per access; a row's experts come in together and none of them leaves for another."""
    resident: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in rows:
        hits += sum(entry in resident for entry in row)
        for entry in row:
            resident.pop(entry, None)
        while len(resident) + len(row) > num_slots:
            resident.popitem(last=False)
        resident.update(dict.fromkeys(row))
    return hits / sum(map(len, rows))


@given(rows_of_steps, st.integers(2, 12))
def test_lru_hits_as_often_as_a_plain_lru(steps: list, num_slots: int) -> None:
    rows = flatten(steps)
    policy = make_policy("lru", MODEL.num_experts, MODEL.experts_per_token)
    assert replay(trace(rows), policy, num_slots).lifetime == pytest.approx(
        naive_lru(rows, num_slots)
    )


@given(rows_of_steps, st.integers(2, 12), st.sampled_from(sorted(POLICIES)))
def test_nobody_beats_the_optimum(steps: list, num_slots: int, name: str) -> None:
    played = trace(flatten(steps))
    policy = make_policy(name, MODEL.num_experts, MODEL.experts_per_token)
    best = replay_optimum(played, num_slots).lifetime
    assert replay(played, policy, num_slots).lifetime <= best + 1e-12


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_with_room_for_all_only_the_first_use_misses(name: str) -> None:
    played = trace([[0, 1], [4, 5], [8]] * 5, num_prefill=3)
    policy = make_policy(name, MODEL.num_experts, MODEL.experts_per_token)
    rates = replay(played, policy, 12)
    assert (rates.decode, rates.lifetime) == (1.0, 20 / 25)
    assert rates == replay_optimum(played, 12)


def test_lru_never_hits_below_a_tokens_working_set_and_the_optimum_does() -> None:
    played = trace([[0, 1], [4, 5], [8, 9]] * 20)
    policy = make_policy("lru", MODEL.num_experts, MODEL.experts_per_token)
    assert replay(played, policy, 4).lifetime == 0
    assert replay_optimum(played, 4).lifetime > 0.4


def test_a_row_of_more_than_fits_is_used_in_waves() -> None:
    played = trace([[0, 1, 2, 3], [0, 1, 2, 3]])
    policy = make_policy("lru", MODEL.num_experts, MODEL.experts_per_token)
    # 3 takes the room of 0, which the second row then takes from 3.
    assert replay(played, policy, 3).lifetime == 2 / 8


def test_without_decoding_there_is_no_decode_rate() -> None:
    assert replay_optimum(trace([[0, 1]], num_prefill=1), 4).decode is None


def test_workers_play_all_rows_each_beginning_elsewhere() -> None:
    rows = [[0], [4], [8], [1], [5], [9]]
    played = trace(rows).played_by(2)
    assert played.streams.tolist() == [0, 1] * 6
    assert [row.tolist() for row in played.rows()][::2] == rows
    assert [row.tolist() for row in played.rows()][1::2] == rows[3:] + rows[:3]

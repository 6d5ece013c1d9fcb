"""Predictions follow from what was measured: exactly where it is simple, never the wrong way."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_inference.advice.hit_rates import Routing, hit_rate
from expertd_inference.advice.prediction import (
    Costs,
    binomial,
    predict,
    predict_gpu,
    token_seconds,
)
from expertd_inference.advice.values import ExpertLayers, Gpu, Host, Need, Reading
from expertstore.pack.layout import Encoding, Matrix, record_layout

GIB = 1 << 30


def matrix(name: str, rows: int, columns: int) -> Matrix:
    return Matrix(name=name, encoding=Encoding.PLAIN, out_features=rows, in_features=columns)


LAYOUT = record_layout(
    (matrix("gate_up", 512, 128), matrix("down", 128, 256)), "BF16", has_bias=False
)
NEED = Need("bf16", (ExpertLayers(4, 8, 2, LAYOUT),), ((matrix("w", 1024, 128), 3),), 1 << 20)
HOST = Host(
    cores=8,
    threads=2,
    workers=1,
    memory_rate=20e9,
    memory_rate_all=20e9,
    ram_bytes=GIB,
    storage_rate=2e9,
    storage=Path("/"),
    disk_free_bytes=GIB,
)
COSTS = Costs(0.010, 0.005, 0.0005, Reading(0.001, 0.0015, 2))
SECONDS = st.floats(1e-7, 10.0)
BYTES = st.integers(NEED.working_set_bytes, 2 * NEED.expert_bytes)


def test_with_all_in_ram_a_token_takes_what_was_measured() -> None:
    row = predict(NEED, COSTS, HOST, NEED.expert_bytes, 100)
    assert row.typical == row.worst == pytest.approx(1 / 0.015)
    assert row.ram_bytes == NEED.expert_bytes + NEED.trunk_bytes + 100
    assert row.read_bytes == 0
    assert row.fits


def test_with_nothing_in_ram_each_layer_calls_and_reads() -> None:
    seconds = token_seconds(NEED, COSTS, HOST, 0.0)
    assert seconds == pytest.approx(0.015 + 4 * (0.0005 + 0.0015))


def test_half_the_experts_missing_is_the_mean_over_what_may_miss() -> None:
    # Of two experts none misses in a quarter of all cases, one in half, both in a quarter.
    waiting = 0.5 * (0.0005 + 0.001) + 0.25 * (0.0005 + 0.0015)
    assert token_seconds(NEED, COSTS, HOST, 0.5) == pytest.approx(0.015 + 4 * waiting)


@given(
    budgets=st.tuples(BYTES, BYTES).map(sorted),
    kernel=SECONDS,
    other=SECONDS,
    call=SECONDS,
    one=SECONDS,
    many=SECONDS,
    workers=st.integers(1, 20),
)
def test_more_ram_is_never_slower(
    budgets: list[int],
    kernel: float,
    other: float,
    call: float,
    one: float,
    many: float,
    workers: int,
) -> None:
    costs = Costs(kernel, other, call, Reading(one, many, 2))
    host = replace(HOST, workers=workers)
    first, second = (predict(NEED, costs, host, budget, 100) for budget in budgets)
    # A rounding's difference is none.
    assert first.typical <= second.typical * (1 + 1e-9)
    assert first.worst <= second.worst * (1 + 1e-9)
    assert first.worst <= first.typical * (1 + 1e-9)
    assert first.ram_bytes <= second.ram_bytes
    assert first.read_bytes >= second.read_bytes


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_more_workers_are_never_faster_each(workers: int, share: float) -> None:
    def each(number: int) -> float:
        # Eight cores read three times as fast as two.
        everyone = min(20e9 * number, 60e9)
        host = replace(HOST, workers=number, memory_rate_all=everyone)
        return predict(NEED, COSTS, host, int(share * NEED.expert_bytes), 100).typical

    assert each(workers + 1) <= each(workers)
    if workers <= 2 and share == 1.0:
        assert each(workers + 1) == pytest.approx(each(1)), "there is enough for three"


def test_four_workers_share_what_memory_has() -> None:
    host = replace(HOST, workers=4, memory_rate_all=40e9)
    assert token_seconds(NEED, COSTS, host, 1.0) == pytest.approx(2 * 0.010 + 0.005)


def test_two_workers_on_one_core_wait_for_each_other() -> None:
    host = replace(HOST, cores=2, workers=2)
    assert token_seconds(NEED, COSTS, host, 1.0) == pytest.approx(2 * 0.015)


def test_what_is_too_large_does_not_fit() -> None:
    host = replace(HOST, ram_bytes=NEED.expert_bytes)
    assert not predict(NEED, COSTS, host, NEED.expert_bytes, 100).fits


def test_reading_more_records_never_takes_less_time() -> None:
    noisy = Reading(0.002, 0.001, 8)
    times = [noisy.seconds(num) for num in range(12)]
    assert times == sorted(times)
    assert times[0] == 0
    assert Reading(0.002, 0.002, 1).seconds(3) == pytest.approx(0.006)


@pytest.mark.parametrize("routing", Routing)
def test_a_larger_share_hits_more(routing: Routing) -> None:
    rates = [hit_rate(share / 100, routing) for share in range(-5, 120)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)
    uniform = [hit_rate(share / 100, Routing.UNIFORM) for share in range(-5, 120)]
    assert all(ours >= theirs for ours, theirs in zip(rates, uniform, strict=True))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probabilities_are_those_of_a_binomial(probability: float) -> None:
    found = binomial(8, probability)
    assert sum(found) == pytest.approx(1)
    assert sum(num * chance for num, chance in enumerate(found)) == pytest.approx(8 * probability)


def test_a_gpu_that_holds_all_is_bound_by_its_memory() -> None:
    row = predict_gpu(NEED, HOST, Gpu(GIB, 10e9, 1e12), 100)
    assert row is not None
    assert row.share == 1
    assert row.typical == row.worst == pytest.approx(1e12 / NEED.token_bytes)


def test_a_gpu_that_holds_half_is_bound_by_its_link() -> None:
    memory = NEED.trunk_bytes + NEED.expert_bytes // 2
    row = predict_gpu(NEED, HOST, Gpu(memory, 1e9, 1e12), 100)
    assert row is not None
    assert row.worst == pytest.approx(1e9 / (0.5 * NEED.working_set_bytes))
    assert row.worst < row.typical


def test_a_gpu_without_room_for_a_token_is_of_no_use() -> None:
    memory = NEED.trunk_bytes + NEED.working_set_bytes - 1
    assert predict_gpu(NEED, HOST, Gpu(memory, 1e9, None), 100) is None

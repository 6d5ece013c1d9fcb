"""Pins of sessions: what is pinned stays, and leaves the models what they need."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from expertd.settings.limits import ModelLimits
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertstore.errors import CapacityError, RecordLostError
from tests.expert_store.in_memory import (
    Worker,
    assert_consistent,
    assert_nothing_held,
    disk,
    storing,
)

RECORD = 2 * PAGE
ROOM = 8  # records; one token of the pack uses 6 of its 24


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with storing({"m": make_pack(tmp_path / "pack")}, ROOM * RECORD) as store:
        yield store


async def test_pinned_records_stay(store: Store) -> None:
    worker, other = Worker(store), Worker(store)
    assert await store.records.pin(worker.session, [0, 1, 1]) == 2
    assert await store.records.pin(worker.session, [1]) == 0
    for start in (2, 8, 14):
        await other.fetch_and_release(*range(start, start + 6))
    assert worker.model.is_resident(0)
    assert worker.session.unpin([1, 5]) == 1
    await other.fetch_and_release(*range(8, 15))
    assert not worker.model.is_resident(1)


async def test_one_token_must_still_fit_beside_the_pins(store: Store) -> None:
    worker = Worker(store)
    with pytest.raises(CapacityError, match="room for 2"):
        await store.records.pin(worker.session, [0, 1, 2])


async def test_pins_at_the_same_time_are_counted_together(store: Store) -> None:
    workers = [Worker(store), Worker(store)]
    disk(store.models["m"]).faults.gate.clear()
    pins = [
        asyncio.create_task(store.records.pin(worker.session, entries))
        for worker, entries in zip(workers, ([0, 1], [2, 3]), strict=True)
    ]
    await asyncio.sleep(0.02)
    disk(store.models["m"]).faults.gate.set()
    results = await asyncio.gather(*pins, return_exceptions=True)
    assert results[0] == 2
    assert isinstance(results[1], CapacityError)


async def test_what_is_pinned_needs_no_room_in_a_fetch(store: Store) -> None:
    worker = Worker(store)
    await store.records.pin(worker.session, [0, 1])
    assert await worker.fetch(*range(8)) == 6
    with pytest.raises(CapacityError, match="waves of 6"):
        await worker.fetch(*range(2, 9))


async def test_a_pin_that_fails_pins_nothing(store: Store) -> None:
    worker = Worker(store)
    disk(store.models["m"]).faults.end = 0
    with pytest.raises(RecordLostError):
        await store.records.pin(worker.session, [0, 1])
    assert worker.session.pins == set()
    assert_nothing_held(store)


@pytest.mark.parametrize("quota", [None, 24 * RECORD])
async def test_a_fetch_costs_the_same_however_much_is_pinned(
    tmp_path: Path, quota: int | None
) -> None:
    limits = {"m": ModelLimits(pins=("0:0-2",))}
    settings = {"default_quota_bytes": quota}
    pack = make_pack(tmp_path / "pack")
    async with storing({"m": pack}, 24 * RECORD, limits, **settings) as store:
        worker, pinner = Worker(store), Worker(store)
        await worker.fetch_and_release(22, 23)
        few = await _calls_of(lambda: worker.fetch(22, 23))
        worker.release()
        await store.records.pin(pinner.session, range(3, 18))
        assert await _calls_of(lambda: worker.fetch(22, 23)) == few
        worker.release()
        assert_consistent(store)


async def _calls_of(work: Callable[[], Awaitable[object]]) -> int:
    """How many functions are called, and generators resumed, by what waits for nothing."""
    calls: Counter[str] = Counter()
    sys.setprofile(lambda _frame, event, _arg: calls.update([event]))
    try:
        await work()
    finally:
        sys.setprofile(None)
    return calls["call"]

"""A caller that goes away at any moment leaves nothing behind and takes nothing along."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from tests.expert_store.in_memory import (
    Worker,
    assert_consistent,
    assert_nothing_held,
    disk,
    storing,
    until,
)

RECORD = 2 * PAGE
ROOM = 8


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with storing({"m": make_pack(tmp_path / "pack")}, ROOM * RECORD) as store:
        yield store


async def _fetch(store: Store, worker: Worker) -> None:
    await worker.fetch(*range(2, 8))


async def _pin(store: Store, worker: Worker) -> None:
    await store.records.pin(worker.session, [2, 3])


async def _read(store: Store, worker: Worker) -> None:
    await store.records.read(worker.model, 2)


@pytest.mark.parametrize("call", [_fetch, _pin, _read])
async def test_cancelled_after_any_number_of_ticks(
    store: Store, call: Callable[[Store, Worker], Awaitable[None]]
) -> None:
    """Each round begins with a full arena, half of it still being read by somebody."""
    reader, caller, other = Worker(store), Worker(store), Worker(store)
    finished, ticks = 0, 0
    while finished < 3:
        for entries in (range(8, 16), range(16, 20)):
            await other.fetch_and_release(*entries)
        reader.holding = True
        task = asyncio.create_task(call(store, caller))
        for tick in range(ticks):
            await asyncio.sleep(0)
            if tick == 5:
                reader.holding = False
                reader.publish()
        finished += task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        reader.holding = False
        reader.publish()
        caller.session.unpin(list(caller.session.pins))
        caller.release()
        await until(lambda: not caller.model.loads and not caller.model.num_reads)
        assert caller.session.fetches_in_flight == 0
        assert_nothing_held(store)
        assert_consistent(store)
        assert await asyncio.wait_for(other.fetch(*range(8)), HANG_SECONDS) <= ROOM, "room was lost"
        other.release()
        ticks += 1 + ticks // 16  # ticks of waiting for a thread are many, and alike
    assert ticks > 5


async def test_who_joined_a_read_gets_the_record_though_its_first_caller_left(
    store: Store,
) -> None:
    first, second = Worker(store), Worker(store)
    file = disk(first.model)
    file.faults.gate.clear()
    fetches = [asyncio.create_task(worker.fetch(3)) for worker in (first, second)]
    await until(lambda: file.offsets)
    await asyncio.sleep(0.005)
    fetches[0].cancel()
    await asyncio.sleep(0.005)
    file.faults.gate.set()
    assert await fetches[1] == 1
    assert second.read(3) is not None
    assert len(file.offsets) == 1
    assert fetches[0].cancelled()
    second.release()
    assert_nothing_held(store)


async def test_a_read_that_nobody_waits_for_any_more_still_arrives(store: Store) -> None:
    worker = Worker(store)
    disk(worker.model).faults.gate.clear()
    fetch = asyncio.create_task(worker.fetch(3))
    await until(lambda: worker.model.loads)
    fetch.cancel()
    disk(worker.model).faults.gate.set()
    await until(lambda: not worker.model.loads)
    assert worker.model.is_resident(3)
    assert_nothing_held(store)

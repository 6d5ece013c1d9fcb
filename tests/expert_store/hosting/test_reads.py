"""Reading records for those without shared memory: never a wrong byte, wherever it comes from."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.hosting.hosted_model import ModelState
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack, record
from expertstore.errors import PreconditionError, RecordLostError
from tests.expert_store.in_memory import Worker, assert_nothing_held, disk, storing, until

RECORD = 2 * PAGE


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with storing({"m": make_pack(tmp_path / "pack")}, 8 * RECORD) as store:
        yield store


async def test_from_the_arena_and_from_the_pack(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch(0)
    offsets = len(disk(worker.model).offsets)
    assert await store.records.read(worker.model, 0) == record(0, 0)
    assert len(disk(worker.model).offsets) == offsets
    assert await store.records.read(worker.model, 1) == record(0, 1)
    assert not worker.model.is_resident(1)


async def test_damage_on_disk_is_told(store: Store) -> None:
    model = store.models["m"]
    disk(model).faults.flipped.add(PAGE)
    with pytest.raises(RecordLostError, match="layer 0 expert 0"):
        await store.records.read(model, 0)
    assert_nothing_held(store)


def damage(store: Store, worker: Worker, entry: int) -> None:
    """One bit of the record in the arena."""
    extent = worker.model.extent(entry)
    assert extent is not None
    store.arena.memory.view[extent.offset + 77] ^= 4


async def test_a_record_damaged_in_ram_is_read_from_the_pack_and_withdrawn(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch_and_release(0)
    store.slots.refresh()
    damage(store, worker, 0)
    assert await store.records.read(worker.model, 0) == record(0, 0)
    assert not worker.model.is_resident(0), "workers would go on computing from it"
    assert await worker.fetch(0) == 1
    assert worker.read(0) == record(0, 0)
    worker.release()
    assert_nothing_held(store)


async def test_it_stays_while_a_step_counts_on_its_being_there(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch(0)
    damage(store, worker, 0)
    assert await store.records.read(worker.model, 0) == record(0, 0)
    assert worker.model.is_resident(0)
    worker.release()
    store.slots.refresh()
    assert await store.records.read(worker.model, 0) == record(0, 0)
    assert not worker.model.is_resident(0)


async def test_damaged_in_both_places_it_is_lost(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch_and_release(0)
    damage(store, worker, 0)
    disk(worker.model).faults.flipped.add(PAGE + 3)
    with pytest.raises(RecordLostError, match=r"layer 0 expert 0 of m is lost.*checksum"):
        await store.records.read(worker.model, 0)
    assert_nothing_held(store)


async def test_a_record_on_its_way_out_is_read_from_the_pack(store: Store) -> None:
    """Its bytes may be reused at any moment; only its readers' epoch keeps them."""
    reader, other = Worker(store), Worker(store)
    await reader.fetch_and_release(*range(8))
    reader.holding = True
    fetch = asyncio.create_task(other.fetch(*range(8, 16)))
    await until(lambda: reader.model.reclaimer.bytes_retired)
    num_reads = len(disk(reader.model).offsets)
    assert await store.records.read(reader.model, 0) == record(0, 0)
    assert len(disk(reader.model).offsets) == num_reads + 1
    reader.holding = False
    await fetch


async def test_a_record_that_is_read_is_not_evicted_meanwhile(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch_and_release(*range(8))
    reads = [asyncio.create_task(store.records.read(worker.model, e)) for e in range(8)]
    await asyncio.sleep(0)
    fetch = asyncio.create_task(worker.fetch(*range(8, 16)))
    assert await asyncio.gather(*reads) == [record(0, entry) for entry in range(8)]
    assert await fetch == 8
    worker.release()
    assert_nothing_held(store)


@pytest.mark.parametrize(
    ("error", "end", "cause"),
    [(errno.EIO, None, "Input/output error"), (None, PAGE + RECORD // 2, "is truncated")],
)
async def test_a_disk_that_fails_is_named(
    store: Store, error: int | None, end: int | None, cause: str
) -> None:
    model = store.models["m"]
    disk(model).faults.error, disk(model).faults.end = error, end
    with pytest.raises(RecordLostError, match=f"layer 0 expert 0 of m is lost: .*{cause}") as lost:
        await store.records.read(model, 0)
    assert lost.value.experts == ((0, 0),)
    assert_nothing_held(store)


async def test_short_reads_are_continued(store: Store) -> None:
    model = store.models["m"]
    disk(model).faults.most_bytes = PAGE
    assert await store.records.read(model, 9) == record(1, 1)


async def test_nothing_is_read_of_a_model_that_goes(store: Store) -> None:
    model = store.models["m"]
    model.state = ModelState.UNLOADING
    with pytest.raises(PreconditionError, match="being unloaded"):
        await store.records.read(model, 0)

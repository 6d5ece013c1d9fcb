"""Scrubbing: what is damaged in RAM is found, withdrawn and read again."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import expertd.hosting.scrubber
from expertd.settings.config import ServeConfig
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack, record
from expertstore.errors import ConfigError
from tests.expert_store.in_memory import Worker, assert_nothing_held, disk, storing, until

RECORD = 2 * PAGE


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("scrubber") / "pack")


@pytest.fixture
async def store(pack: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    monkeypatch.setattr(expertd.hosting.scrubber, "_MIN_PAUSE_SECONDS", 0.002)
    async with storing({"m": pack}, 12 * RECORD, scrub_bytes_per_second=1 << 30) as store:
        yield store


def flip(worker: Worker, entry: int) -> None:
    extent = worker.model.extent(entry)
    assert extent is not None
    worker.store.arena.memory.view[extent.offset + RECORD - 1] ^= 4


async def test_a_flipped_bit_is_found_and_the_record_read_again(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch_and_release(*range(8))
    flip(worker, 5)
    await until(lambda: not worker.model.is_resident(5))
    assert worker.model.counters.records_damaged == 1
    assert [e for e in range(8) if worker.model.is_resident(e)] == [0, 1, 2, 3, 4, 6, 7]
    assert await worker.fetch(5) == 1
    assert worker.read(5) == record(0, 5)
    worker.release()
    await store._scrubber.close()
    assert_nothing_held(store)


async def test_its_bytes_wait_for_who_may_be_reading_them(store: Store) -> None:
    worker, other = Worker(store), Worker(store)
    await worker.fetch(5)
    worker.holding = True
    extent = worker.model.extent(5)
    flip(worker, 5)
    await until(lambda: not worker.model.is_resident(5))
    await other.fetch_and_release(*range(8, 16))
    assert store.slots.extents.bytes_used >= 9 * RECORD, "they are not free yet"
    assert extent is not None
    assert all(other.model.extent(entry) != extent for entry in range(8, 16))
    worker.holding = False
    worker.release()
    await until(lambda: store.slots.refresh() or not other.model.reclaimer.bytes_retired)


async def test_a_pinned_record_is_withdrawn_too(store: Store) -> None:
    worker = Worker(store)
    await store.records.pin(worker.session, [5])
    flip(worker, 5)
    await until(lambda: not worker.model.is_resident(5))
    assert await worker.fetch(5) == 1
    assert worker.read(5) == record(0, 5)


async def test_all_models_again_and_again(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expertd.hosting.scrubber, "_MIN_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(expertd.hosting.scrubber, "_MAX_BATCH", 3)
    models = {"m": pack, "n": pack}
    async with storing(models, 16 * RECORD, scrub_bytes_per_second=1 << 30) as store:
        workers = [Worker(store, name) for name in models]
        for _ in range(2):
            for worker in workers:
                await worker.fetch_and_release(0, 7)
                flip(worker, 7)
                await until(lambda worker=worker: not worker.model.is_resident(7))
        assert await store.unload_model("n") == RECORD
        flip(workers[0], 0)
        await until(lambda: not workers[0].model.is_resident(0))


async def test_what_is_being_verified_is_not_evicted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_slow, under_way, go_on = threading.Event(), threading.Event(), threading.Event()
    num_verified = 0

    def verify(record: memoryview, checksum: str) -> bool:
        nonlocal num_verified
        num_verified += 1
        if not is_slow.is_set():
            return True
        under_way.set()
        return go_on.wait(10)

    monkeypatch.setattr(expertd.hosting.scrubber, "matches", verify)
    worker = Worker(store)
    await worker.fetch_and_release(*range(8))
    # Rounds that began before all of them were there have ended: each verifies eight at most.
    seen = num_verified
    await until(lambda: num_verified >= seen + 16)
    is_slow.set()
    await asyncio.to_thread(under_way.wait, 10)
    fetch = asyncio.create_task(worker.fetch(*range(8, 16)))
    await asyncio.sleep(0.05)
    assert all(map(worker.model.is_resident, range(8)))
    assert not fetch.done()
    go_on.set()
    assert await fetch == 8


async def test_zero_turns_it_off(pack: Path) -> None:
    async with storing({"m": pack}, 12 * RECORD) as store:
        worker = Worker(store)
        await worker.fetch_and_release(5)
        flip(worker, 5)
        await asyncio.sleep(0.2)
        assert worker.model.is_resident(5)
        assert len(disk(worker.model).offsets) == 1


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="scrub_bytes_per_second is -1"):
        ServeConfig(Path("s"), 1 << 20, scrub_bytes_per_second=-1)

"""Fetches and hints, against workers that behave and workers that do not."""

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack, record
from expertstore.errors import (
    CapacityError,
    DeadlineError,
    InvalidInputError,
    PreconditionError,
    RecordLostError,
    SessionLostError,
)
from tests.expert_store.in_memory import Worker, assert_nothing_held, disk, storing, until

RECORD = 2 * PAGE
ROOM = 8  # records; one token of the pack uses 6 of its 24


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("records") / "pack")


@pytest.fixture
async def store(pack: Path) -> AsyncIterator[Store]:
    async with storing({"m": pack}, ROOM * RECORD) as store:
        yield store


def bytes_of(entry: int) -> bytes:
    return record(*divmod(entry, 8))


def test_the_harness_sees_what_is_held_back(pack: Path) -> None:
    async def leak() -> None:
        async with storing({"m": pack}, ROOM * RECORD) as store:
            await Worker(store).fetch(0)
            with pytest.raises(AssertionError):
                assert_nothing_held(store)

    asyncio.run(leak())


async def test_fetched_records_are_where_the_directory_says(store: Store) -> None:
    worker = Worker(store)
    assert await worker.fetch(3, 9, 3) == 2
    assert [worker.read(entry) for entry in (3, 9)] == [bytes_of(3), bytes_of(9)]
    assert await worker.fetch(9) == 0
    worker.release()
    assert_nothing_held(store)


async def test_a_record_is_read_once_however_many_ask(store: Store) -> None:
    file = disk(store.models["m"])
    file.faults.gate.clear()
    workers = [Worker(store) for _ in range(5)]
    fetches = [asyncio.create_task(worker.fetch(1, 2)) for worker in workers]
    await until(lambda: len(file.offsets) == 2)
    await asyncio.sleep(0.01)
    file.faults.gate.set()
    assert await asyncio.gather(*fetches) == [2] * 5
    assert len(file.offsets) == 2
    assert store.models["m"].counters.nvme_bytes_read == 2 * RECORD


async def test_each_record_is_read_once_under_many_sessions(pack: Path) -> None:
    """Sessions that want overlapping sets, in any order, while reads go on."""
    async with storing({"m": pack}, 24 * RECORD, loader_threads=4) as store:
        workers = [Worker(store) for _ in range(24)]

        async def ask(number: int, worker: Worker) -> None:
            random_entries = random.Random(number)
            for _ in range(6):
                await worker.fetch_and_release(*random_entries.sample(range(24), 5))
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(number, worker) for number, worker in enumerate(workers)))
        assert len(disk(store.models["m"]).offsets) == 24
        assert_nothing_held(store)


async def test_a_fetch_is_read_in_the_order_of_the_file(pack: Path) -> None:
    async with storing({"m": pack}, 24 * RECORD, loader_threads=1) as store:
        worker = Worker(store)
        await worker.fetch(20, 3, 9, 17, 0)
        assert [(offset - PAGE) // RECORD for offset in disk(worker.model).offsets] == [
            0, 3, 9, 17, 20,
        ]  # fmt: skip


async def test_a_fetch_of_more_than_fits_is_told_how_many_do(store: Store) -> None:
    worker = Worker(store)
    with pytest.raises(CapacityError, match="waves of 8") as caught:
        await worker.fetch(*range(9))
    assert (caught.value.requested, caught.value.available) == (9, 8)
    assert await worker.fetch(*range(8)) == 8


async def test_leased_records_stay_whatever_others_fetch(store: Store) -> None:
    holder, other = Worker(store), Worker(store)
    await holder.fetch(0, 1, 2)
    for entries in ((3, 4, 5, 6, 7), (8, 9, 10, 11, 12), (3, 4, 5, 6, 7)):
        await other.fetch_and_release(*entries)
    assert [holder.read(entry) for entry in (0, 1, 2)] == [bytes_of(e) for e in (0, 1, 2)]


async def test_fetches_are_granted_whole_and_in_order(store: Store) -> None:
    holder, first, second = Worker(store), Worker(store), Worker(store)
    await holder.fetch(0, 1, 2, 3)
    order: list[str] = []
    large = asyncio.create_task(first.fetch(*range(8, 16)))
    large.add_done_callback(lambda _: order.append("large"))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(second.fetch(4))
    small.add_done_callback(lambda _: order.append("small"))
    await asyncio.sleep(0.05)
    assert order == [], "the small one would fit, and the large one would starve"
    holder.release()
    assert await large == 8
    first.release()
    await small
    assert order == ["large", "small"]


@pytest.mark.parametrize("moment", ["waiting for room", "waiting for its turn", "reading"])
async def test_a_cancelled_fetch_frees_everything(store: Store, moment: str) -> None:
    holder, patient, hasty = Worker(store), Worker(store), Worker(store)
    file = disk(store.models["m"])
    await holder.fetch(*range(5 if moment != "reading" else 1))
    if moment == "reading":
        file.faults.gate.clear()
    if moment == "waiting for its turn":
        before = asyncio.create_task(patient.fetch(*range(8, 14)))
        await asyncio.sleep(0.01)
    fetch = asyncio.create_task(hasty.fetch(*range(16, 21)))
    await asyncio.sleep(0.02)
    assert not fetch.done()
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    file.faults.gate.set()
    holder.release()
    if moment == "waiting for its turn":
        await before
        patient.release()
    await until(lambda: not store.models["m"].loads)
    assert_nothing_held(store)
    assert await hasty.fetch(*range(8, 16)) == len(
        [entry for entry in range(8, 16) if moment != "waiting for its turn" or entry > 13]
    )


async def test_the_fetch_of_a_session_that_ends_frees_everything(store: Store) -> None:
    holder, dying = Worker(store), Worker(store)
    await holder.fetch(*range(6))
    fetch = asyncio.create_task(dying.fetch(*range(8, 14)))
    await asyncio.sleep(0.02)
    store.detach(dying.session)
    holder.release()
    with pytest.raises(SessionLostError):
        await fetch
    await until(lambda: not store.models["m"].loads)
    assert_nothing_held(store)


async def test_a_session_that_ends_gives_up_leases_and_pins(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch(0, 1)
    await store.records.pin(worker.session, [2])
    store.detach(worker.session)
    store.detach(worker.session)
    assert worker.closed
    assert_nothing_held(store)


async def test_bytes_are_not_reused_before_the_reader_has_published(store: Store) -> None:
    reader, other = Worker(store), Worker(store)
    await reader.fetch_and_release(*range(8))
    reader.holding = True
    words = [reader.directory.word(entry) for entry in range(8)]
    fetch = asyncio.create_task(other.fetch(8))
    await until(lambda: reader.num_nudges)
    assert not fetch.done()
    offset = (words[0] & 0xFFFF_FFFF) - 1  # the arena as the reader still sees it
    assert bytes(store.arena.view[offset * PAGE : offset * PAGE + RECORD]) == bytes_of(0)
    reader.holding = False
    assert await fetch == 1


@pytest.mark.parametrize("fidgets", [False, True])
async def test_who_stands_still_is_cut_off_once_others_wait(pack: Path, fidgets: bool) -> None:
    async with storing({"m": pack}, ROOM * RECORD, stall_seconds=0.1) as store:
        reader, other = Worker(store), Worker(store)
        await reader.fetch_and_release(*range(8))
        reader.holding = True
        page = reader.page
        await asyncio.sleep(0.2)
        assert not reader.closed, "nobody waited"
        fetch = asyncio.create_task(other.fetch(8))
        while not fetch.done():
            if fidgets and not reader.session.closed:
                # Numbers that move but free nothing are no progress.
                page.released_fetch += 1
                page.epoch = 0 if page.epoch else 1
            assert page.revoked or not other.read(8), "reused before it was revoked"
            await asyncio.sleep(0.002)
        assert await fetch == 1
        assert reader.closed
        assert page.revoked
        assert not other.closed


async def test_no_room_within_the_time_is_a_deadline(pack: Path) -> None:
    async with storing({"m": pack}, ROOM * RECORD, fetch_seconds=0.1) as store:
        holder, other = Worker(store), Worker(store)
        await holder.fetch(*range(8))
        with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
            await other.fetch(8)
        holder.release()
        assert await other.fetch(8) == 1


async def test_fetch_numbers_only_grow(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch(0)
    worker.num_fetches = 0
    with pytest.raises(InvalidInputError, match="number 1 was used"):
        await worker.fetch(1)


async def test_only_so_many_fetches_at_once(store: Store) -> None:
    holder, busy = Worker(store), Worker(store)
    await holder.fetch(*range(8))
    fetches = [asyncio.create_task(busy.fetch(8)) for _ in range(9)]
    done, _ = await asyncio.wait(fetches, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(PreconditionError, match="in flight"):
        await done.pop()
    holder.release()
    await asyncio.gather(*fetches, return_exceptions=True)
    assert busy.session.fetches_in_flight == 0


@pytest.mark.parametrize("cause", ["end", "error", "flipped"])
async def test_a_lost_record_fails_its_fetches_and_no_others(store: Store, cause: str) -> None:
    worker, file = Worker(store), disk(store.models["m"])
    if cause == "end":
        file.faults.end = 0
    elif cause == "error":
        file.faults.error = errno.EIO
    else:
        file.faults.flipped.add(PAGE + 5 * RECORD + 77)
    with pytest.raises(RecordLostError, match="layer 0 expert 5") as caught:
        await worker.fetch(5)
    assert caught.value.experts == ((0, 5),)
    assert worker.read(5) is None
    file.faults.end = file.faults.error = None
    file.faults.flipped.clear()
    assert_nothing_held(store)
    assert store.models["m"].counters.records_lost == 1
    assert await worker.fetch(5, 6) == 2, "it is tried anew"


async def test_a_load_that_fails_while_its_fetch_waits_for_room_is_not_forgotten(
    store: Store,
) -> None:
    """Else the fetch would be granted without the record."""
    holder, first, second = Worker(store), Worker(store), Worker(store)
    file = disk(store.models["m"])
    await holder.fetch(*range(8, 14))
    file.faults.gate.clear()
    file.faults.flipped.add(PAGE)
    loading = asyncio.create_task(first.fetch(0))
    await until(lambda: 0 in store.models["m"].loads)
    joined = asyncio.create_task(second.fetch(0, 1, 2))  # room for one: it must wait
    await asyncio.sleep(0.01)
    file.faults.gate.set()
    with pytest.raises(RecordLostError):
        await loading
    holder.release()
    with pytest.raises(RecordLostError):
        await joined


async def test_a_new_hint_does_not_withdraw_what_demand_has_joined(store: Store) -> None:
    holder, hinter, asker = Worker(store), Worker(store), Worker(store)
    file, model = disk(store.models["m"]), store.models["m"]
    await holder.fetch(*range(8, 12))
    file.faults.gate.clear()
    busy = asyncio.create_task(hinter.fetch(20, 22))  # both loader threads are at it
    await until(lambda: len(file.offsets) == 6)
    store.records.prefetch(hinter.session, [0], 0)
    await until(lambda: 0 in model.loads)
    asked = asyncio.create_task(asker.fetch(0, 1, 2))
    await asyncio.sleep(0.01)
    store.records.prefetch(hinter.session, [3], 0)
    file.faults.gate.set()
    await busy
    hinter.release()
    holder.release()
    assert await asked == 3
    assert asker.read(0) == bytes_of(0)
    assert model.counters.prefetch_late == 1


class TestHints:
    async def test_useful_late_and_wasted_are_told_apart(self, store: Store) -> None:
        worker, model = Worker(store), store.models["m"]
        counters = model.counters
        assert store.records.prefetch(worker.session, [0, 1, 1], 0) == 2
        await until(lambda: model.num_resident == 2)
        worker.page.touch([0, 0])
        store.slots.refresh()
        assert (counters.prefetch_issued, counters.prefetch_useful) == (2, 1)
        await worker.fetch_and_release(*range(8, 16))
        await until(lambda: counters.evictions == 2)
        assert counters.prefetch_wasted == 1
        assert (counters.host_hits, counters.nvme_misses) == (2, 0)

    async def test_a_hint_does_not_evict_what_a_running_step_uses(self, store: Store) -> None:
        worker, model = Worker(store), store.models["m"]
        await worker.fetch_and_release(*range(8))
        worker.page.touch(range(8))
        store.records.prefetch(worker.session, [8, 9], 0)
        await asyncio.sleep(0.05)
        assert [entry for entry in range(24) if model.is_resident(entry)] == list(range(8))
        assert model.counters.prefetch_issued == 0

    async def test_a_hint_evicts_what_has_long_been_idle(self, store: Store) -> None:
        worker, model = Worker(store), store.models["m"]
        await worker.fetch_and_release(*range(8))
        worker.page.touch([0, 1] * 12)  # the accesses of four tokens
        store.records.prefetch(worker.session, [8, 9], 0)
        await until(lambda: model.is_resident(8) and model.is_resident(9))
        assert model.is_resident(0)
        assert model.is_resident(1)

    async def test_a_newer_hint_supersedes_what_has_not_begun(self, pack: Path) -> None:
        async with storing({"m": pack}, ROOM * RECORD, loader_threads=1) as store:
            worker, model = Worker(store), store.models["m"]
            file = disk(model)
            file.faults.gate.clear()
            store.records.prefetch(worker.session, list(range(8)), 0)
            await until(lambda: len(model.loads) == 4 and file.offsets)
            store.records.prefetch(worker.session, [20], 0)
            assert list(model.loads) == [0], "the one that is being read"
            file.faults.gate.set()
            await until(lambda: model.is_resident(20))
            assert model.num_resident == 2
            assert model.counters.prefetch_issued == 2

    async def test_a_session_that_ends_hints_no_more(self, store: Store) -> None:
        worker, model = Worker(store), store.models["m"]
        disk(model).faults.gate.clear()
        store.records.prefetch(worker.session, list(range(8)), 0)
        await until(lambda: len(model.loads) == 4)
        store.detach(worker.session)
        disk(model).faults.gate.set()
        await until(lambda: not model.loads)
        await asyncio.sleep(0.02)
        assert model.num_resident <= 2

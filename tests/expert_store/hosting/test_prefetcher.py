"""Hints: in order of priority, in the room that demand leaves, and forgotten when superseded."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.hosting.hosted_model import ModelState
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import PreconditionError
from tests.expert_store.in_memory import Worker, assert_nothing_held, disk, storing, until

RECORD = 2 * PAGE
ROOM = 8
QUEUED = 4
"""Hinted reads that are under way or queued, at most."""


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("prefetcher") / "pack")


@pytest.fixture
async def store(pack: Path) -> AsyncIterator[Store]:
    async with storing({"m": pack}, ROOM * RECORD, loader_threads=1) as store:
        yield store


def hint(worker: Worker, *entries: int, priority: int = 0) -> int:
    return worker.store.records.prefetch(worker.session, entries, priority)


def read_order(store: Store) -> list[int]:
    """The entries that were read, in order."""
    return [(offset - PAGE) // RECORD for offset in disk(store.models["m"]).offsets]


async def test_the_highest_priority_goes_first_and_of_one_priority_they_take_turns(
    store: Store,
) -> None:
    file, workers = disk(store.models["m"]), [Worker(store) for _ in range(4)]
    file.faults.gate.clear()
    hint(workers[0], *range(QUEUED))
    # As many as there may be.
    await until(lambda: len(store.models["m"].loads) == QUEUED and file.offsets)
    hint(workers[1], 12, 13)
    hint(workers[2], 10, priority=5)
    hint(workers[3], 16)
    file.faults.gate.set()
    await until(lambda: store.models["m"].num_resident == ROOM)
    assert read_order(store)[QUEUED:] == [10, 12, 16, 13]


async def test_who_hints_again_and_again_has_its_turn_and_no_more(store: Store) -> None:
    file, greedy, modest = disk(store.models["m"]), Worker(store), Worker(store)
    file.faults.gate.clear()
    hint(greedy, *range(QUEUED))
    await until(lambda: len(store.models["m"].loads) == QUEUED and file.offsets)
    for entry in range(8, 16):
        hint(greedy, *range(QUEUED), entry)
        hint(modest, 20, 21)
    file.faults.gate.set()
    await until(lambda: store.models["m"].num_resident == QUEUED + 3)
    assert read_order(store)[QUEUED:] == [20, 15, 21]


async def test_what_is_hinted_at_again_is_not_withdrawn(store: Store) -> None:
    """As what two layers foresee of a third."""
    worker, file = Worker(store), disk(store.models["m"])
    file.faults.gate.clear()
    hint(worker, 0, 1, 2)
    await until(lambda: len(worker.model.loads) == 3 and file.offsets)
    assert hint(worker, 1, 9) == 1
    await until(lambda: 9 in worker.model.loads)
    assert sorted(worker.model.loads) == [0, 1, 9]  # the first is being read
    assert worker.model.counters.prefetch_withdrawn == 1
    file.faults.gate.set()
    await until(lambda: worker.model.num_resident == 3)
    assert read_order(store) == [0, 1, 9]


async def test_an_empty_hint_drops_what_has_not_begun(store: Store) -> None:
    worker, file = Worker(store), disk(store.models["m"])
    file.faults.gate.clear()
    hint(worker, *range(8))
    await until(lambda: len(worker.model.loads) == QUEUED and file.offsets)
    assert hint(worker) == 0
    assert len(worker.model.loads) == 1, "it is being read"
    file.faults.gate.set()
    await until(lambda: not worker.model.loads)
    assert worker.model.num_resident == 1
    assert_nothing_held(store)


async def test_room_is_made_before_the_worker_reads_the_next_layer(pack: Path) -> None:
    """What it reads it gives up only at the layer's end; a hint that comes meanwhile has room."""
    async with storing({"m": pack}, ROOM * RECORD) as store:
        worker = Worker(store)
        for first in (0, 2, 4, 6):
            await worker.fetch_and_release(first, first + 1)
            worker.page.touch([first, first + 1])
        worker.page.touch([16, 17] * 3)  # the last layer, long after those
        store.slots.refresh()
        hint(worker, 8)
        await until(lambda: worker.model.is_resident(8))
        worker.publish()  # at the layer's end
        worker.holding = True  # answers no nudge
        hint(worker, 9)
        await until(lambda: worker.model.is_resident(9))


async def test_what_will_be_fetched_is_read_before_hints_and_once(store: Store) -> None:
    worker, file = Worker(store), disk(store.models["m"])
    file.faults.gate.clear()
    hint(worker, 0, 1, 2)
    await until(lambda: len(worker.model.loads) == 3 and file.offsets)
    store.records.expect(worker.session, [2, 8, 8])
    hint(worker, 16)  # drops what the last one said, but not what is needed
    fetch = asyncio.create_task(worker.fetch(2, 8))
    file.faults.gate.set()
    assert await fetch == 2, "they count as missed"
    await until(lambda: worker.model.is_resident(16))
    assert read_order(store) == [0, 2, 8, 16]
    assert worker.model.counters.prefetch_late == 1
    worker.release()
    assert_nothing_held(store)


async def test_what_will_be_fetched_overtakes_nobody_who_waits_for_room(store: Store) -> None:
    """Nor is anything kept of it if it is never fetched."""
    worker = Worker(store)
    async with store.slots.turn():
        store.records.expect(worker.session, [12])
        assert not worker.model.loads
    store.records.expect(worker.session, [12])
    await until(lambda: worker.model.is_resident(12))
    assert_nothing_held(store)


async def test_only_what_is_neither_resident_nor_loading_is_read(store: Store) -> None:
    worker, file = Worker(store), disk(store.models["m"])
    await worker.fetch_and_release(0)
    file.faults.gate.clear()
    fetch = asyncio.create_task(worker.fetch(1))
    await until(lambda: 1 in worker.model.loads)
    assert hint(worker, 0, 1, 2, 2) == 1
    file.faults.gate.set()
    await fetch
    await until(lambda: worker.model.is_resident(2))
    assert sorted(read_order(store)) == [0, 1, 2]
    assert worker.model.counters.prefetch_issued == 1
    assert hint(worker, 0, 1, 2) == 0


async def test_demand_overtakes_hints(store: Store) -> None:
    hinter, asker, file = Worker(store), Worker(store), disk(store.models["m"])
    file.faults.gate.clear()
    hint(hinter, 0, 1, 2)
    await until(lambda: len(hinter.model.loads) == 3 and file.offsets)
    fetches = [asyncio.create_task(asker.fetch(entry)) for entry in (1, 5)]
    await until(lambda: asker.model.counters.prefetch_late == 1)
    file.faults.gate.set()
    assert await asyncio.gather(*fetches) == [1, 1]
    await until(lambda: asker.model.is_resident(2))
    assert read_order(store) == [0, 1, 5, 2]
    assert asker.model.counters.prefetch_issued == 3
    hint_that_was_late = asker.model.counters.prefetch_late
    asker.page.touch([1])
    store.slots.refresh()
    assert hint_that_was_late == 1
    assert asker.model.counters.prefetch_useful == 0, "late and useful at once"


async def test_a_hint_takes_no_room_from_a_fetch_that_waits(store: Store) -> None:
    holder, asker, hinter = Worker(store), Worker(store), Worker(store)
    await holder.fetch(*range(4))
    await asker.fetch_and_release(*range(8, 10))
    fetch = asyncio.create_task(asker.fetch(*range(16, 24)))
    await asyncio.sleep(0.01)
    assert not fetch.done()
    hint(hinter, 5, 6)
    await asyncio.sleep(0.03)
    assert hinter.model.counters.prefetch_issued == 0
    holder.release()
    assert await asyncio.wait_for(fetch, HANG_SECONDS) == 8
    await asyncio.sleep(0.05)
    assert all(asker.model.is_resident(entry) for entry in range(16, 24))
    assert hinter.model.counters.prefetch_issued == 0, "leased records made way for a hint"


async def test_a_hint_without_room_is_given_up_and_later_ones_are_not(store: Store) -> None:
    holder, hinter = Worker(store), Worker(store)
    await holder.fetch(*range(8))
    hint(hinter, 8, 9)
    await asyncio.sleep(0.5)
    holder.page.touch([0] * 24)
    holder.release()
    await asyncio.sleep(0.1)
    assert not hinter.model.is_resident(8), "it was retried for ever"
    hint(hinter, 10)
    await until(lambda: hinter.model.is_resident(10))


async def test_hints_for_one_model_spare_the_running_step_of_another(
    pack: Path, tmp_path: Path
) -> None:
    """However much the one works meanwhile: a slow model's step lasts."""
    other = make_pack(tmp_path / "other", layers=1)
    async with storing({"m": pack, "slow": other}, ROOM * RECORD) as store:
        slow, busy = Worker(store, "slow"), Worker(store, "m")
        await slow.fetch_and_release(0, 1)
        slow.page.touch([0, 1])
        await busy.fetch_and_release(*range(6))
        for _ in range(50):
            busy.page.touch(range(6))
        store.slots.refresh()
        hint(busy, 8, 9)
        await asyncio.sleep(0.05)
        assert slow.model.is_resident(0)
        assert slow.model.is_resident(1)


async def test_hints_take_what_a_model_without_sessions_left_behind(
    pack: Path, tmp_path: Path
) -> None:
    other = make_pack(tmp_path / "other", layers=1)
    async with storing({"m": pack, "left": other}, ROOM * RECORD) as store:
        gone, busy = Worker(store, "left"), Worker(store, "m")
        await gone.fetch_and_release(0, 1)
        gone.page.touch([0, 1])
        store.detach(gone.session)
        await busy.fetch_and_release(*range(6))
        busy.page.touch(range(6))
        hint(busy, 8, 9)
        await until(lambda: busy.model.is_resident(8) and busy.model.is_resident(9))
        assert gone.model.num_resident == 0


async def test_a_damaged_record_that_is_hinted_at_harms_nothing(store: Store) -> None:
    worker = Worker(store)
    disk(worker.model).faults.flipped.add(PAGE)
    hint(worker, 0, 1)
    await until(lambda: worker.model.is_resident(1))
    assert not worker.model.is_resident(0)
    assert worker.model.counters.records_lost == 1
    assert_nothing_held(store)


async def test_hints_for_a_model_that_is_being_unloaded_are_refused(store: Store) -> None:
    worker = Worker(store)
    worker.model.state = ModelState.UNLOADING
    with pytest.raises(PreconditionError, match="being unloaded"):
        hint(worker, 0)


async def test_closing_twice(store: Store) -> None:
    hint(Worker(store), *range(8))
    await store.records.close()
    await store.records.close()

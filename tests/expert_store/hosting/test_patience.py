"""Fetches for which no slot is to be had: how long they wait, and what they get instead."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.hosting.patience import (
    GRACE_SECONDS,
    MAX_ANNEX_BYTES,
    annex_bytes,
    seconds_of_patience,
)
from expertd.hosting.records import Fetched
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertstore.errors import CapacityError
from tests.expert_store.in_memory import Worker, assert_nothing_held, disk, storing, until

RECORD = 2 * PAGE
ROOM = 8  # records; one token of the pack uses 6 of its 24


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with storing({"m": make_pack(tmp_path / "pack")}, ROOM * RECORD) as store:
        yield store


@pytest.mark.parametrize(
    ("missing", "max_in_pack", "wanted", "obtainable", "in_waves", "seconds"),
    [
        (2, 0, 4, 8, True, None),  # a client that cannot
        (5, 4, 8, 8, False, None),  # more than it can
        (5, 4, 8, 8, True, GRACE_SECONDS),  # the same, but fewer would do
        (2, 4, 4, 4, False, GRACE_SECONDS),  # would fit if others let go
        (2, 4, 4, 3, False, 0.0),  # would not: those stand still
        (0, 4, 4, 8, False, GRACE_SECONDS),  # all resident, and others wait before it
    ],
)
def test_how_long_a_fetch_waits(
    missing: int,
    max_in_pack: int,
    wanted: int,
    obtainable: int,
    in_waves: bool,
    seconds: float | None,
) -> None:
    assert seconds == seconds_of_patience(
        missing=missing,
        max_in_pack=max_in_pack,
        wanted=wanted,
        obtainable=obtainable,
        in_waves=in_waves,
    )


async def fetch(worker: Worker, *entries: int, most: int = ROOM) -> Fetched:
    worker.num_fetches += 1
    return await worker.store.records.fetch(worker.session, entries, worker.num_fetches, most)


async def test_where_there_is_room_nothing_changes(store: Store) -> None:
    worker = Worker(store)
    assert await fetch(worker, 0, 1) == Fetched(2)
    assert worker.session.leased
    assert await fetch(worker, *range(6)) == Fetched(4), "what is evictable is room"


async def test_slots_that_are_let_go_soon_are_waited_for(store: Store) -> None:
    holder, other = Worker(store), Worker(store)
    await holder.fetch(*range(6))
    waiting = asyncio.create_task(fetch(other, 8, 9, 10))
    await until(lambda: store.slots.is_taken)
    holder.release()
    assert await waiting == Fetched(3)


async def test_a_fetch_that_gets_no_slot_is_sent_to_the_pack(store: Store) -> None:
    """All leased or pinned; what it has of it nobody else has to do without."""
    pinner, holder, other = Worker(store), Worker(store), Worker(store)
    await store.records.pin(pinner.session, [0, 1])
    await holder.fetch(*range(2, 8))
    assert await fetch(other, 1, 8, 9) == Fetched(2, [1, 8, 9])
    model = store.models["m"]
    assert (model.counters.records_in_pack, other.session.records_in_pack) == (2, 2)
    assert not other.session.leased, "it would keep others waiting for what it does not need"
    holder.release()
    assert await fetch(other, 8, 9) == Fetched(2), "there is room again"
    other.release()
    pinner.session.unpin([0, 1])
    assert_nothing_held(store)


async def test_who_stands_still_is_waited_for_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, other = Worker(store), Worker(store)
    await holder.fetch(*range(6))
    model = store.models["m"]
    assert store.slots.obtainable_records(model) == ROOM
    assert (await fetch(other, 8, 9, 10)).in_pack
    await until_stands_still(holder, other)
    assert store.slots.obtainable_records(model) == 2
    monkeypatch.setattr("expertd.hosting.patience.GRACE_SECONDS", 1e6)  # to wait would be noticed
    assert (await fetch(other, 8, 20, 21)).in_pack
    assert await fetch(other, 22, 23) == Fetched(2), "so much is free"
    holder.release()
    other.release()
    assert await fetch(other, *range(8, 16)) == Fetched(8)


async def until_stands_still(holder: Worker, other: Worker) -> None:
    """Until fetches in vain have shown that nothing is to be expected of the holder."""
    while not holder.session.stands_still:
        assert (await fetch(other, 8, 9, 10)).in_pack


async def test_who_is_sent_to_the_pack_does_not_save_a_stuck_worker(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    async with storing({"m": pack}, ROOM * RECORD, stall_seconds=0.3) as store:
        stuck, other = Worker(store), Worker(store)
        stuck.holding = True
        await stuck.fetch(*range(6))
        while not stuck.closed:
            assert (await fetch(other, 8, 9, 10)).in_pack or stuck.closed
        assert await fetch(other, 8, 9, 10) == Fetched(3)


async def test_a_worker_that_holds_back_what_was_evicted(store: Store) -> None:
    reader, other = Worker(store), Worker(store)
    await reader.fetch_and_release(*range(8))
    reader.holding = True  # as by a hit: it leases nothing, but publishes nothing either
    assert (await fetch(other, *range(8, 14))).in_pack
    while not reader.session.stands_still:
        assert (await fetch(other, *range(8, 14))).in_pack
    assert store.slots.obtainable_records(store.models["m"]) == ROOM - 6
    reader.holding = False
    reader.publish()
    assert await fetch(other, *range(8, 14)) == Fetched(6)


@pytest.mark.parametrize("most", [0, 2])
async def test_who_cannot_read_so_much_waits(store: Store, most: int) -> None:
    holder, other = Worker(store), Worker(store)
    await holder.fetch(*range(6))
    waiting = asyncio.create_task(fetch(other, 8, 9, 10, most=most))
    await asyncio.sleep(3 * GRACE_SECONDS)
    assert not waiting.done()
    holder.release()
    assert await waiting == Fetched(3)


async def test_who_goes_in_waves_is_told_how_many_it_can_read(store: Store) -> None:
    holder, other = Worker(store), Worker(store)
    await holder.fetch(*range(6))
    other.num_fetches += 1
    with pytest.raises(CapacityError, match="waves of 2") as caught:
        await store.records.fetch(other.session, [8, 9, 10], 1, 2, in_waves=True)
    assert (caught.value.requested, caught.value.available) == (3, 2)
    assert store.models["m"].counters.records_in_pack == 0
    holder.release()
    assert_nothing_held(store)


async def test_a_slow_disk_is_no_want_of_slots(store: Store) -> None:
    file = disk(store.models["m"])
    file.faults.gate.clear()
    reading = asyncio.create_task(fetch(Worker(store), 0, 1))
    await asyncio.sleep(3 * GRACE_SECONDS)
    assert not reading.done()
    file.faults.gate.set()
    assert await reading == Fetched(2)


async def test_behind_one_that_waits_nobody_waits_longer(store: Store) -> None:
    """And who waits as long as it takes does not lose its place to them."""
    holder, patient, other = Worker(store), Worker(store), Worker(store)
    await holder.fetch(*range(6))
    waiting = asyncio.create_task(patient.fetch(*range(8, 16)))
    await until(lambda: store.slots.is_taken)
    assert await fetch(other, 0, 16) == Fetched(1, [0, 16])
    assert not waiting.done()
    holder.release()
    assert await waiting == 8


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([(2 << 20, 8, 2)], 16 << 20),  # all of a small layer
        ([(2 << 20, 512, 8), (1 << 20, 8, 2)], MAX_ANNEX_BYTES),
        ([(350 << 20, 8, 2)], 700 << 20),  # or one token could not be served
    ],
)
def test_how_much_of_its_own_memory_a_worker_may_use(
    layers: list[tuple[int, int, int]], expected: int
) -> None:
    assert annex_bytes(layers) == expected

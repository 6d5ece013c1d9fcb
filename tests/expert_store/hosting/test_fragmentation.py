"""Records of different sizes under one budget: what fits by size is accepted, whatever came before.

Random loads, unloads, fetches, pins and hints over models whose record sizes have no common
measure but the page. After every step all bytes are accounted for, and what the store says
fits is granted as soon as the others are idle.
"""

import asyncio
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.memory.extents import Extent
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import CapacityError
from tests.expert_store.in_memory import Worker, assert_consistent, storing, until

SIZES = {"one": 1, "two": 2, "three": 3, "five": 5}
ROOM = 24  # pages
NUM_EXPERTS = 16


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("fragmentation")
    return {
        name: make_pack(
            path / name, layers=2, experts=8, experts_per_token=1, record_bytes=pages * PAGE
        )
        for name, pages in SIZES.items()
    }


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["fetch", "fetch", "all", "pin", "pin", "unpin", "hint", "touch", "detach", "unload"]
        ),
        st.sampled_from(list(SIZES)),
        st.integers(0, NUM_EXPERTS - 1),
        st.integers(1, 6),
    ),
    min_size=6,
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(steps=steps)
def test_what_fits_by_size_is_accepted(
    packs: dict[str, Path], steps: list[tuple[str, str, int, int]]
) -> None:
    asyncio.run(_play(packs, steps))


async def _play(packs: dict[str, Path], steps: list[tuple[str, str, int, int]]) -> None:
    async with storing({}, ROOM * PAGE, fetch_seconds=2.0) as store:
        workers: dict[str, Worker] = {}
        for what, name, first, count in steps:
            if name not in store.models and not await _load(store, name, packs[name]):
                continue
            worker = workers.get(name) or workers.setdefault(name, Worker(store, name))
            for other in workers.values():
                other.release()
            entries = [(first + 5 * index) % NUM_EXPERTS for index in range(count)]
            await _step(store, workers, worker, what, entries)
            assert_consistent(store)


def _needed_pages(store: Store) -> int:
    """What admission counts: one token of each model, and the pinned."""
    return sum(SIZES[name] * 2 for name in store.models) + _pinned_pages(store)


def _pinned_pages(store: Store) -> int:
    pinned = {(s.model.name, entry) for s in store.sessions.values() for entry in s.pins}
    return sum(SIZES[name] for name, _ in pinned)


async def _load(store: Store, name: str, pack: Path) -> bool:
    fits = _needed_pages(store) + 2 * SIZES[name] <= ROOM
    if not fits:
        with pytest.raises(CapacityError):
            await store.load_model(name, pack)
    else:
        await store.load_model(name, pack)
    return fits


async def _step(
    store: Store, workers: dict[str, Worker], worker: Worker, what: str, entries: list[int]
) -> None:
    model, session = worker.model, worker.session
    most = store.budget.max_fetch_records(model)
    if what in ("fetch", "all"):
        assert most == (ROOM - _pinned_pages(store)) // SIZES[model.name]
        if what == "all":
            free = [entry for entry in range(NUM_EXPERTS) if entry not in session.pins]
            entries = [*session.pins, *free[:most]]
        if len(set(entries) - session.pins) <= most:
            await worker.fetch(*entries)
            assert all(worker.read(entry) for entry in entries)
        else:
            with pytest.raises(CapacityError, match=f"waves of {most}"):
                await worker.fetch(*entries)
    elif what == "pin":
        new = SIZES[model.name] * len(set(entries) - session.pins)
        if _needed_pages(store) + new <= ROOM:
            await store.records.pin(session, entries)
            assert session.pins >= set(entries)
        else:
            with pytest.raises(CapacityError, match="cannot be pinned"):
                await store.records.pin(session, entries)
    elif what == "unpin":
        session.unpin(entries)
    elif what == "hint":
        store.records.prefetch(session, entries, 0)
        await asyncio.sleep(0.002)
    elif what == "touch":
        worker.page.touch(entries)
        store.slots.refresh()
    elif what == "detach":
        store.detach(session)
        del workers[model.name]
    else:
        await asyncio.wait_for(store.unload_model(model.name), HANG_SECONDS)
        del workers[model.name]


async def test_pins_that_cannot_slide_make_way_first(packs: dict[str, Path]) -> None:
    """Each gap is smaller than any pinned record: only a hole elsewhere lets them move."""
    models = {name: packs[name] for name in ("one", "three", "five")}
    async with storing(models, 30 * PAGE) as store:
        little, middle, large = (Worker(store, name) for name in ("one", "three", "five"))
        for entry in range(4):  # 1333 1333 1333 1333
            await little.fetch_and_release(entry)
            await middle.fetch_and_release(entry)
        await store.records.pin(middle.session, [0, 1, 2, 3])
        words = [middle.directory.word(entry) for entry in range(4)]
        assert store.budget.max_fetch_records(large.model) == 3
        assert await asyncio.wait_for(large.fetch(0, 1, 2), HANG_SECONDS) == 3
        assert_consistent(store)
        assert [middle.directory.word(entry) for entry in range(4)] != words
        large.release()
        assert await asyncio.wait_for(little.fetch(*range(16)), HANG_SECONDS) >= 12
        assert_consistent(store)


async def test_pins_leave_a_hole_to_move_in(packs: dict[str, Path]) -> None:
    """Had they been pinned where they lay, no gap would have been as large as either of them."""
    models = {name: packs[name] for name in ("one", "five")}
    async with storing(models, 22 * PAGE) as store:
        little, large = Worker(store, "one"), Worker(store, "five")
        await little.fetch_and_release(0, 1, 2, 3)
        await large.fetch_and_release(0)
        await little.fetch_and_release(4, 5, 6, 7)
        await large.fetch_and_release(1)
        await little.fetch_and_release(8, 9, 10, 11)
        assert await asyncio.wait_for(store.records.pin(large.session, [0, 1]), HANG_SECONDS) == 2
        assert_consistent(store)
        assert await asyncio.wait_for(large.fetch(2, 3), HANG_SECONDS) == 2
        assert_consistent(store)


async def test_who_reads_a_record_that_moves_reads_on(packs: dict[str, Path]) -> None:
    models = {name: packs[name] for name in ("one", "five")}
    async with storing(models, 14 * PAGE) as store:
        little, large, reader = Worker(store, "one"), Worker(store, "five"), Worker(store, "one")
        await little.fetch_and_release(*range(5))
        little.model.evict([0, 1, 2, 3])
        await store.records.pin(little.session, [4])  # ....p........., and no two of five fit
        extent = little.model.extent(4)
        assert extent is not None
        assert extent.offset == 4 * PAGE
        before = bytes(store.arena.view[extent.offset : extent.offset + PAGE])
        reader.publish()
        store.slots.refresh()
        reader.holding = True
        fetch = asyncio.create_task(large.fetch(0, 1))
        await until(lambda: little.model.counters.moves)
        assert little.read(4) == before
        for _ in range(10):
            await asyncio.sleep(0.002)
            assert bytes(store.arena.view[extent.offset : extent.offset + PAGE]) == before
        assert not fetch.done()
        reader.holding = False
        assert await asyncio.wait_for(fetch, HANG_SECONDS) == 2
        assert little.read(4) == before
        assert_consistent(store)


@pytest.mark.parametrize("during", [False, True], ids=["before", "while it is copied"])
async def test_what_our_own_thread_reads_does_not_move(
    packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    """No epoch protects it."""
    models = {name: packs[name] for name in ("one", "five")}
    async with storing(models, 14 * PAGE) as store:
        little, large = Worker(store, "one"), Worker(store, "five")
        await little.fetch_and_release(*range(5))
        little.model.evict([0, 1, 2, 3])
        await store.records.pin(little.session, [4])
        gate = _gate_copies(store, monkeypatch)
        if not during:
            little.model.hold([4])  # as a Read does while its thread is at it
            gate.set()
        fetch = asyncio.create_task(large.fetch(0, 1))
        if during:
            await until(lambda: store.slots.mover.is_busy)
            little.model.hold([4])
            gate.set()
        await asyncio.sleep(0.03)
        assert not little.model.counters.moves
        little.model.unhold([4])
        assert await asyncio.wait_for(fetch, HANG_SECONDS) == 2


async def test_a_caller_that_goes_while_a_record_moves(
    packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy goes on in its thread: its target must not be used meanwhile."""
    models = {name: packs[name] for name in ("one", "five")}
    async with storing(models, 14 * PAGE) as store:
        little, large = Worker(store, "one"), Worker(store, "five")
        await little.fetch_and_release(*range(9))
        await store.records.pin(little.session, [4])
        gate = _gate_copies(store, monkeypatch)
        fetch = asyncio.create_task(large.fetch(0, 1))
        await until(lambda: store.slots.mover.is_busy)
        fetch.cancel()
        await asyncio.gather(fetch, return_exceptions=True)
        other = asyncio.create_task(Worker(store, "one").fetch(*range(9, 13)))
        await asyncio.sleep(0.01)
        gate.set()
        await until(lambda: not store.slots.mover.is_busy)
        await other
        assert little.read(4)
        assert_consistent(store)


def _gate_copies(store: Store, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Records that move are copied once the event is set."""
    gate, copy = threading.Event(), store.slots.mover._copy

    def wait_and_copy(source: Extent, target: Extent) -> None:
        gate.wait(5)
        copy(source, target)

    monkeypatch.setattr(store.slots.mover, "_copy", wait_and_copy)
    return gate

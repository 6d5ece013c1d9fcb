"""Room: granted whole and in order, made by evicting the coldest, never from who holds it."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.hosting.hosted_model import HostedModel
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import CapacityError
from tests.expert_store.in_memory import (
    Worker,
    assert_consistent,
    assert_nothing_held,
    storing,
    until,
)


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Records of one, two and four pages, three layers of eight experts."""
    path = tmp_path_factory.mktemp("slots")
    sizes = {"small": 1, "middle": 2, "large": 4}
    return {name: make_pack(path / name, record_bytes=n * PAGE) for name, n in sizes.items()}


def only(packs: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: packs[name] for name in names}


@pytest.fixture
async def store(packs: dict[str, Path]) -> AsyncIterator[Store]:
    """Room for eight records, of which a token uses six."""
    async with storing({"small": packs["small"]}, 8 * PAGE) as store:
        yield store


async def use(worker: Worker, *entries: int) -> None:
    """One step of a worker."""
    await worker.fetch(*entries)
    worker.page.touch(entries)
    worker.release()


def resident(model: HostedModel) -> set[int]:
    return {entry for entry in range(model.num_entries) if model.is_resident(entry)}


async def test_the_coldest_records_go(store: Store) -> None:
    worker = Worker(store, "small")
    await use(worker, *range(8))
    for _ in range(3):
        await use(worker, 0, 2, 3, 4, 6, 7)
    await use(worker, 9, 10)
    assert resident(worker.model) == {0, 2, 3, 4, 6, 7, 9, 10}
    assert_consistent(store)


async def test_the_coldest_of_all_models_go(packs: dict[str, Path]) -> None:
    """An idle model's records, however hot they were, make room for a busy one's."""
    async with storing(only(packs, "small", "middle"), 24 * PAGE) as store:
        idle, busy = Worker(store, "small"), Worker(store, "middle")
        await use(idle, *range(8))
        idle.page.touch(list(range(8)) * 50)
        for _ in range(100):
            await use(busy, *range(6))
            store.slots.refresh()
        await use(busy, *range(6, 12))
        assert resident(busy.model) == set(range(12))
        assert resident(idle.model) == set()
        assert_consistent(store)


async def test_two_that_need_more_than_half_do_not_starve_each_other(store: Store) -> None:
    """Were each granted what is free now, all would wait for ever."""
    workers = [Worker(store, "small") for _ in range(4)]
    done: list[int] = []

    async def step(number: int) -> None:
        await workers[number].fetch(*[(number * 5 + i) % 24 for i in range(6)])
        done.append(number)
        await asyncio.sleep(0.001)
        workers[number].release()

    await asyncio.wait_for(asyncio.gather(*map(step, range(4))), HANG_SECONDS)
    assert done == [0, 1, 2, 3]
    assert_nothing_held(store)


async def test_bytes_are_not_reused_while_somebody_may_read_them(store: Store) -> None:
    """The words are withdrawn at once, the bytes wait for the reader's epoch."""
    reader, other = Worker(store, "small"), Worker(store, "small")
    await use(reader, *range(8))
    reader.holding = True  # it found all of them by itself
    fetch = asyncio.create_task(other.fetch(8))
    await until(lambda: reader.model.reclaimer.bytes_retired)
    for _ in range(5):
        await asyncio.sleep(0.002)
        assert_consistent(store)  # among others: nothing overlaps what is retired
    assert not fetch.done()
    reader.holding = False
    assert await fetch == 1


async def test_who_gives_up_waiting_does_not_save_who_stands_still(
    packs: dict[str, Path],
) -> None:
    """Each caller has less patience than the stall; together they have waited long enough."""
    async with storing(only(packs, "small"), 8 * PAGE, stall_seconds=0.1) as store:
        stuck, hasty = Worker(store, "small"), Worker(store, "small")
        await stuck.fetch(*range(8))
        stuck.holding = True
        for _ in range(6):
            try:
                await asyncio.wait_for(hasty.fetch(8), 0.04)
                break
            except TimeoutError:
                pass
        assert stuck.closed


async def test_standing_still_costs_nothing_while_nobody_waits(packs: dict[str, Path]) -> None:
    models = only(packs, "small", "middle")
    async with storing(models, 18 * PAGE, stall_seconds=0.5) as store:
        slow, quick, other = (
            Worker(store, "small"),
            Worker(store, "middle"),
            Worker(store, "middle"),
        )
        await slow.fetch(*range(6))  # leased until it says so
        await quick.fetch(*range(6))
        fetch = asyncio.create_task(other.fetch(8))
        await until(lambda: slow.num_nudges)
        quick.release()
        await fetch  # it has waited for both, and the one was enough
        other.release()
        await asyncio.sleep(0.6)
        fetch = asyncio.create_task(other.fetch(*range(8, 15)))
        await asyncio.sleep(0.01)
        slow.release()
        await fetch
        assert not slow.closed


@pytest.mark.parametrize("seed", range(6))
async def test_what_is_free_early_is_not_in_the_way_of_the_rest(
    packs: dict[str, Path], seed: int
) -> None:
    """Pages come free at random; taking the first hole at once would often cut the rest in two."""
    async with storing(only(packs, "small", "large"), 32 * PAGE) as store:
        little, others, big = Worker(store, "small"), [], Worker(store, "large")
        scattered = random.Random(seed).sample(range(24), 24)
        await use(big, 0, 1)
        for entry in scattered:
            await use(little, entry)
        for entry in scattered[:6]:
            others.append(Worker(store, "small"))
            await others[-1].fetch(entry)
        fetch = asyncio.create_task(big.fetch(*range(8)))
        for other in others:
            await asyncio.sleep(0.003)
            other.release()
        assert await asyncio.wait_for(fetch, HANG_SECONDS) >= 6
        assert resident(big.model) == set(range(8))
        assert_consistent(store)


async def test_a_large_record_in_the_middle_moves(packs: dict[str, Path]) -> None:
    async with storing(only(packs, "small", "large"), 30 * PAGE) as store:
        little, big = Worker(store, "small"), Worker(store, "large")
        await use(little, 0, 1, 2)
        await use(big, 0)
        extent = big.model.extent(0)
        assert extent is not None
        assert extent.offset == 3 * PAGE
        assert await asyncio.wait_for(big.fetch(*range(7)), HANG_SECONDS) == 6
        assert big.model.counters.moves == 1
        assert_consistent(store)
        big.release()
        assert_nothing_held(store)


steps = st.lists(
    st.tuples(
        st.sampled_from(["fetch", "release", "pin", "unpin", "detach", "unload", "hint", "touch"]),
        st.sampled_from(["small", "middle", "large"]),
        st.integers(0, 23),
        st.integers(1, 9),
    ),
    min_size=4,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_whatever_happens_bytes_are_neither_lost_nor_used_twice(
    packs: dict[str, Path], steps: list[tuple[str, str, int, int]]
) -> None:
    """And what the store says fits is granted as soon as the others are idle."""
    asyncio.run(_play(packs, steps))


async def _play(packs: dict[str, Path], steps: list[tuple[str, str, int, int]]) -> None:
    async with storing({}, 44 * PAGE, fetch_seconds=2.0) as store:
        workers: dict[str, Worker] = {}
        for what, name, first, count in steps:
            if name not in store.models:
                try:
                    await store.load_model(name, packs[name])
                except CapacityError:
                    assert any(worker.session.pins for worker in workers.values())
                    continue
            if name not in workers:
                workers[name] = Worker(store, name)
            worker, entries = workers[name], [(first + i) % 24 for i in range(count)]
            for other in workers.values():
                other.release()
            await _step(store, workers, worker, what, entries)
            assert_consistent(store)


async def _step(
    store: Store, workers: dict[str, Worker], worker: Worker, what: str, entries: list[int]
) -> None:
    model, session = worker.model, worker.session
    if what == "fetch":
        fits = store.budget.max_fetch_records(model)
        if len(set(entries) - session.pins) <= fits:
            await worker.fetch(*entries)
            assert all(worker.read(entry) for entry in entries)
        else:
            with pytest.raises(CapacityError, match=f"waves of {fits}"):
                await worker.fetch(*entries)
    elif what == "pin":
        try:
            await store.records.pin(session, entries)
        except CapacityError as error:
            assert error.requested > error.available  # noqa: PT017 - both are fine
    elif what == "unpin":
        session.unpin(entries)
    elif what == "hint":
        store.records.prefetch(session, entries, 0)
        await asyncio.sleep(0.002)
    elif what == "touch":
        worker.page.touch(entries)
    elif what == "detach":
        store.detach(session)
        del workers[model.name]
    elif what == "unload":
        await asyncio.wait_for(store.unload_model(model.name), HANG_SECONDS)
        del workers[model.name]

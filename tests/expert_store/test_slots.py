"""Room: granted whole and in order, made by evicting the coldest, never what is held."""

import asyncio
from pathlib import Path

import pytest

from tests.expert_store.small_store import RECORD, Worker, small_store, until


async def test_the_coldest_records_go(tmp_path: Path) -> None:
    async with small_store(tmp_path, 4) as store:
        model = store.add()
        worker = Worker(store)
        await worker.use(0, 1, 2, 3)
        for _ in range(3):
            await worker.use(0, 2, 3)
        await worker.use(9)
        assert store.resident(model) == {0, 2, 3, 9}
        store.check()


async def test_an_idle_models_records_go_first(tmp_path: Path) -> None:
    async with small_store(tmp_path, 8) as store:
        idle, busy = store.add("idle"), store.add("busy")
        sleeper, worker = Worker(store, "idle"), Worker(store, "busy")
        for _ in range(20):
            await sleeper.use(0, 1, 2, 3)
        for _ in range(100):
            await worker.use(0, 1, 2, 3)
        for entry in range(4, 8):
            await worker.use(entry)
        assert store.resident(busy) == set(range(8))
        assert store.resident(idle) == set()


async def test_first_come_first_served_and_all_or_nothing(tmp_path: Path) -> None:
    """Each needs more than half: were halves granted, both would wait for ever."""
    async with small_store(tmp_path, 5) as store:
        store.add()
        workers = [Worker(store) for _ in range(4)]
        done: list[int] = []

        async def step(number: int) -> None:
            first = number * 3
            await workers[number].fetch(first, first + 1, first + 2, (first + 7) % 24)
            done.append(number)
            await asyncio.sleep(0.001)
            workers[number].release()

        await asyncio.wait_for(asyncio.gather(*map(step, range(4))), 20)
        assert done == [0, 1, 2, 3]
        store.check_idle()


async def test_a_worker_that_holds_delays_reuse_and_is_nudged(tmp_path: Path) -> None:
    async with small_store(tmp_path, 2) as store:
        model = store.add()
        holder, other = Worker(store), Worker(store)
        await holder.fetch(0, 1)
        waiting = asyncio.create_task(other.fetch(2, 3))
        await until(lambda: holder.num_nudges > 3)
        assert store.resident(model) == {0, 1}, "leased records were evicted"
        assert not waiting.done()
        holder.release()
        assert await waiting == 2
        assert not holder.hung_up
        store.check()


async def test_readers_without_leases_keep_their_bytes(tmp_path: Path) -> None:
    """Words are withdrawn at once, but the bytes wait for the epoch."""
    async with small_store(tmp_path, 2) as store:
        model = store.add()
        reader, other = Worker(store), Worker(store)
        await reader.use(0, 1)
        reader.holding = True  # it found both resident, without a fetch
        offset = model.extent(0).offset
        waiting = asyncio.create_task(other.fetch(2))
        await until(lambda: model.reclaimer.bytes_retired)
        assert store.arena.view[offset : offset + RECORD] == store.expected(model, 0)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        reader.release()
        await waiting
        store.check()


async def test_who_stands_still_is_cut_off_and_told_first(tmp_path: Path) -> None:
    async with small_store(tmp_path, 2, stall_seconds=0.05) as store:
        store.add()
        stuck, other = Worker(store), Worker(store)
        await stuck.fetch(0, 1)
        page_bytes = stuck.session.memory.view[:4096]
        assert await other.fetch(2, 3) == 2
        assert stuck.hung_up
        assert stuck.session.closed
        assert page_bytes.cast("Q")[6] == 1, "its page does not say revoked"
        assert stuck.session.token not in store.sessions
        other.release()
        store.check_idle()


async def test_nobody_is_cut_off_while_nobody_waits(tmp_path: Path) -> None:
    async with small_store(tmp_path, 2, stall_seconds=0.03) as store:
        store.add()
        slow, other = Worker(store), Worker(store)
        await slow.fetch(0, 1)
        await asyncio.sleep(0.06)
        waiting = asyncio.create_task(other.fetch(2))
        await asyncio.sleep(0.01)
        slow.release()
        await waiting
        assert not slow.hung_up


async def test_impatient_callers_do_not_save_who_stands_still(tmp_path: Path) -> None:
    """Each gives up before the stall is over; together they have waited long enough."""
    async with small_store(tmp_path, 2, stall_seconds=0.1) as store:
        store.add()
        stuck, other = Worker(store), Worker(store)
        await stuck.fetch(0, 1)
        for _ in range(6):
            try:
                await other.fetch(2, 3, seconds=0.04)
                break
            except TimeoutError:
                pass
        assert stuck.hung_up


async def test_records_scattered_between_larger_ones_make_way(tmp_path: Path) -> None:
    """Bytes enough, but in no hole large enough: what lies between has to go."""
    async with small_store(tmp_path, 8) as store:
        small, large = store.add("small"), store.add("large", record_bytes=4 * RECORD)
        little, big = Worker(store, "small"), Worker(store, "large")
        for entry in range(8):
            await little.use(entry)
        for _ in range(4):
            await little.use(0, 1, 2, 7)  # hot at both ends
        await big.use(0, 1)
        assert store.resident(large) == {0, 1}
        assert store.resident(small) == set()
        store.check_idle()


async def test_what_the_caller_holds_itself_makes_way_too(tmp_path: Path) -> None:
    """A large record in the middle leaves no hole for the second one: it moves."""
    async with small_store(tmp_path, 10) as store:
        store.add("small")
        large = store.add("large", record_bytes=4 * RECORD)
        little, big = Worker(store, "small"), Worker(store, "large")
        await little.use(0, 1, 2)
        await big.use(0)
        assert large.extent(0).offset == 3 * RECORD
        assert await big.fetch(0, 1, seconds=5) == 2
        assert store.resident(large) == {0, 1}
        big.release()
        store.check_idle()


@pytest.mark.parametrize("free", [(0, 5, 6, 7), (1, 2, 3, 4), (0, 1, 2, 3)])
async def test_what_is_taken_early_is_not_in_the_way_of_the_rest(
    tmp_path: Path, free: tuple[int, ...]
) -> None:
    """Of eight, four come free in the wrong places and the others later."""
    async with small_store(tmp_path, 8) as store:
        small, large = store.add("small"), store.add("large", record_bytes=4 * RECORD)
        little, other, big = Worker(store, "small"), Worker(store, "small"), Worker(store, "large")
        for entry in range(8):
            await little.use(entry)
        await other.fetch(*set(range(8)) - set(free))
        waiting = asyncio.create_task(big.fetch(0, 1))
        await until(lambda: store.resident(small).isdisjoint(free))
        await asyncio.sleep(0.005)
        other.release()
        assert await asyncio.wait_for(waiting, 5) == 2
        assert store.resident(large) == {0, 1}
        big.release()
        store.check_idle()

"""Memory of all Reads together: first come, first served, and never more than there is."""

import asyncio
from collections.abc import Sequence

import pytest

from expertd.hosting.read_ahead import ByteBudget, read_ahead
from expertstore.errors import RecordLostError

SIZE = 10


async def tick() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_first_come_first_served() -> None:
    budget = ByteBudget(3 * SIZE)
    await budget.take(2 * SIZE)
    order: list[str] = []

    async def take(name: str, num_bytes: int) -> None:
        await budget.take(num_bytes)
        order.append(name)

    large = asyncio.create_task(take("large", 3 * SIZE))
    await tick()
    small = asyncio.create_task(take("small", SIZE))
    await tick()
    assert order == [], "the small one fits, but the large one came first"
    assert not budget.try_take(SIZE)
    budget.give(2 * SIZE)
    await tick()
    assert order == ["large"]
    budget.give(3 * SIZE)
    await asyncio.gather(large, small)
    assert (order, budget.used) == (["large", "small"], SIZE)


async def test_what_is_larger_than_all_goes_alone() -> None:
    budget = ByteBudget(SIZE)
    await budget.take(5 * SIZE)
    assert not budget.try_take(1)
    budget.give(5 * SIZE)
    assert budget.try_take(SIZE)


@pytest.mark.parametrize("served", [False, True])
async def test_who_gives_up_leaves_nothing_behind(served: bool) -> None:
    budget = ByteBudget(SIZE)
    await budget.take(SIZE)
    waiting = asyncio.create_task(budget.take(SIZE))
    behind = asyncio.create_task(budget.take(SIZE))
    await tick()
    if served:
        budget.give(SIZE)  # it has its turn, and is cancelled before it runs
        waiting.cancel()
    else:
        waiting.cancel()
        await tick()
        budget.give(SIZE)
    await tick()
    assert waiting.cancelled()
    assert behind.done()
    assert budget.used == SIZE


async def test_a_large_one_that_gives_up_lets_the_small_ones_pass() -> None:
    budget = ByteBudget(3 * SIZE)
    await budget.take(SIZE)
    large = asyncio.create_task(budget.take(3 * SIZE))
    small = asyncio.create_task(budget.take(SIZE))
    await tick()
    large.cancel()
    await tick()
    assert small.done()


class Disk:
    """Reads that end when they are told to."""

    def __init__(self, *lost: int) -> None:
        self.started: list[int] = []
        self._lost = lost

    async def read(self, entry: int) -> bytes:
        self.started.append(entry)
        await asyncio.sleep(0)
        if entry in self._lost:
            raise RecordLostError("lost", experts=[(0, entry)])
        return bytes([entry])


def stream(disk: Disk, budget: ByteBudget, entries: Sequence[int]):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return read_ahead(entries, disk.read, lambda _: SIZE, budget)


async def test_the_next_is_read_while_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.hosting.read_ahead.AHEAD_BYTES", SIZE)
    disk, budget = Disk(), ByteBudget(10 * SIZE)
    records = stream(disk, budget, [4, 5, 6])
    assert await anext(records) == (4, bytes([4]))
    await tick()
    assert disk.started == [4, 5]
    assert budget.used == 2 * SIZE
    assert [entry async for entry, _ in records] == [5, 6]
    assert budget.used == 0


async def test_as_many_as_keep_the_disk_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.hosting.read_ahead.AHEAD_BYTES", 3 * SIZE)
    disk, budget = Disk(), ByteBudget(10 * SIZE)
    records = stream(disk, budget, range(9))
    await anext(records)
    await tick()
    assert disk.started == [0, 1, 2, 3]
    await anext(records)
    await tick()
    assert disk.started == [0, 1, 2, 3, 4]
    assert [entry async for entry, _ in records] == [2, 3, 4, 5, 6, 7, 8]
    assert budget.used == 0


async def test_not_where_others_wait_for_the_room() -> None:
    disk, budget = Disk(), ByteBudget(SIZE)
    records = stream(disk, budget, [4, 5])
    await anext(records)
    other = asyncio.create_task(anext(stream(disk, budget, [9])))
    await tick()
    assert disk.started == [4]
    following = asyncio.create_task(anext(records))
    await tick()
    assert disk.started == [4, 9], "it waits behind the other"
    assert await other == (9, bytes([9]))
    following.cancel()


async def test_a_lost_record_is_told_when_it_is_its_turn() -> None:
    budget = ByteBudget(10 * SIZE)
    records = stream(Disk(5), budget, [4, 5, 6])
    assert await anext(records) == (4, bytes([4]))
    with pytest.raises(RecordLostError):
        await anext(records)
    assert budget.used == 0


async def test_a_stream_that_is_left_gives_all_back() -> None:
    disk, budget = Disk(5), ByteBudget(10 * SIZE)
    records = stream(disk, budget, [4, 5, 6])
    await anext(records)
    await records.aclose()
    await tick()
    assert budget.used == 0

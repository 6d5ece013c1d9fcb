"""Rows of a table in a file: fetched, hinted at, damaged; and how much of the arena they get."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from expertd.memory.arena import Arena
from expertd.tables.hosted_table import HostedTable
from expertd.tables.room import TableRoom, room_for
from expertstore.errors import (
    CapacityError,
    InvalidInputError,
    NotFoundError,
    PackError,
    RecordLostError,
)
from expertstore.pack.table import Table, TableEncoding, block_checksum

NO_ROWS = np.empty(0, np.int64)
COLUMNS, PER_BLOCK, NUM_ROWS = 160, 12, 1000
BLOCKS = -(-NUM_ROWS // PER_BLOCK)
TABLE = Table(
    name="n.weight",
    file="table-00000.safetensors",
    num_bytes=4096 * (1 + BLOCKS),
    offset=4096,
    num_rows=NUM_ROWS,
    num_columns=COLUMNS,
    rows_per_token=16,
    dtype="BF16",
    encoding=TableEncoding.PLAIN,
    block_bytes=4096,
    rows_per_block=PER_BLOCK,
)
VALUES = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 2 * COLUMNS), np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / TABLE.file
    content = bytearray(TABLE.num_bytes)
    view = memoryview(content)
    for block in range(BLOCKS):
        part = view[4096 * (1 + block) : 4096 * (2 + block)]
        rows = VALUES[block * PER_BLOCK : (block + 1) * PER_BLOCK].tobytes()
        part[: len(rows)] = rows
        part[-8:] = block_checksum(part, block).to_bytes(8, "little")
    path.write_bytes(content)
    return path


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(1 << 20, lock=False)
    yield made
    made.close()


def manifest(*tables: Table, expert_bytes: int = 0) -> Any:
    return SimpleNamespace(tables=tables, expert_bytes=expert_bytes)


def host(arena: Arena, file: Path, num_bytes: int = 1 << 19) -> HostedTable:
    (table,) = TableRoom(arena, num_bytes, 1).open("m", file.parent, manifest(TABLE))
    return table


def rows(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


async def test_each_block_is_read_once(arena: Arena, file: Path) -> None:
    table = host(arena, file)
    wanted = rows(999, 0, 5, 500, 5, 11)
    fetched = await asyncio.gather(*(table.fetch(wanted, NO_ROWS) for _ in range(3)))
    assert all((data == VALUES[wanted]).all() for data in fetched)
    assert table.counters.nvme_bytes_read == 3 * 4096, "rows 0, 5 and 11 are of one block"
    assert (table.counters.hits, table.counters.misses) == (0, 15)
    assert (await table.fetch(wanted, rows(5, 0)) == VALUES[wanted]).all()
    assert (table.counters.hits, table.counters.misses) == (7, 15)
    await table.close()


async def test_hints_are_read_and_leave_half_the_room(arena: Arena, file: Path) -> None:
    table = host(arena, file, 64 << 10)
    most = table.slots.places.num_slots // 2
    assert table.prefetch(rows(*range(NUM_ROWS))) == most
    assert table.prefetch(rows(*range(NUM_ROWS))) == 0, "what was hinted at is not begun yet"
    assert table._hinting is not None
    await table._hinting
    here = NUM_ROWS - int(table.slots.missing(rows(*range(NUM_ROWS))).sum())
    assert here == most == table.slots.num_resident
    await table.close()


async def test_demand_waits_for_no_hint(
    arena: Arena, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = host(arena, file)
    read, go_on = table._file.read, threading.Event()

    def slowly(blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        if blocks[0] < 40:
            go_on.wait(10)
        return read(blocks)

    monkeypatch.setattr(table._file, "read", slowly)
    table.prefetch(rows(*range(12 * 8)))
    await asyncio.sleep(0)
    assert (await table.fetch(rows(960), NO_ROWS) == VALUES[960]).all()
    assert table.counters.prefetched == 0
    coming = asyncio.create_task(table.fetch(rows(3), NO_ROWS))
    await asyncio.sleep(0)
    go_on.set()
    assert (await coming == VALUES[3]).all()
    await table.close()
    # The hint's eight blocks and the other one: row 3 waited for the read that was under way.
    assert table.counters.nvme_bytes_read == 9 * 4096


async def test_a_hint_waits_for_demand(
    arena: Arena, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = host(arena, file)
    read, go_on = table._file.read, threading.Event()

    def slowly(blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        go_on.wait(10)
        return read(blocks)

    monkeypatch.setattr(table._file, "read", slowly)
    coming = asyncio.create_task(table.fetch(rows(3), NO_ROWS))
    await asyncio.sleep(0)
    table.prefetch(rows(960))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [*table._reads] == [0], "the block of row 3 alone is being read"
    go_on.set()
    await coming
    assert table._hinting is not None
    await table._hinting
    assert table.counters.prefetched == 1
    await table.close()


async def test_a_damaged_block_is_lost_alone(arena: Arena, file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(4096 * 3 + 100)  # of block 2
        opened.write(bytes(20))
    table = host(arena, file)
    with pytest.raises(RecordLostError, match=r"Rows 24 to 35 of n\.weight .* checksum is wrong"):
        await table.fetch(rows(30), NO_ROWS)
    assert (await table.fetch(rows(36), NO_ROWS) == VALUES[36]).all()
    assert table.counters.rows_lost == PER_BLOCK
    await table.close()


async def test_rows_that_are_not_there(arena: Arena, file: Path) -> None:
    table = host(arena, file)
    for row in (-1, NUM_ROWS):
        with pytest.raises(NotFoundError, match=f"no row {row}: it has 1000"):
            await table.fetch(rows(0, row), NO_ROWS)
    with pytest.raises(InvalidInputError, match="at most 6553"):
        table.prefetch(np.zeros(6554, np.int64))
    await table.close()


def test_a_file_that_is_too_short(arena: Arena, file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(TABLE.num_bytes - 1)
    room = TableRoom(arena, 1 << 19, 1)
    with pytest.raises(PackError, match="348159 of 348160 bytes, which the 1000 rows"):
        room.open("m", file.parent, manifest(TABLE))


async def test_room_is_shared_and_comes_back(arena: Arena, file: Path) -> None:
    room = TableRoom(arena, 64 << 10, 2)
    (first,) = room.open("a", file.parent, manifest(TABLE))
    (second,) = room.open("b", file.parent, manifest(TABLE))
    places = [table.slots.places for table in (first, second)]
    assert places[0].offset >= arena.num_bytes - (64 << 10)
    assert places[0].offset + places[0].num_bytes <= places[1].offset
    assert places[1].offset + places[1].num_bytes <= arena.num_bytes
    with pytest.raises(CapacityError, match=r"rows that one token reads, .* --table-ram"):
        room.open("c", file.parent, manifest(TABLE))
    await room.close([first])
    (third,) = room.open("c", file.parent, manifest(TABLE))
    await room.close([second, third])


def test_how_much_is_for_rows() -> None:
    all_of_it = room_for(None, 1 << 30, [manifest(TABLE, expert_bytes=1 << 29)])
    assert all_of_it < 400 << 10, "a small table needs no more than itself"
    large = msgspec.structs.replace(TABLE, num_rows=1 << 30)
    assert room_for(None, 1 << 20, [manifest(large, expert_bytes=1 << 30)]) == 1 << 17
    assert room_for(None, 1 << 20, [manifest(large, expert_bytes=1 << 19)]) == 1 << 19
    assert room_for(None, 4096, [manifest(large)]) > 16 * 320, "what one token reads, all the same"
    assert room_for(None, 1 << 20, [manifest()]) == 0
    assert room_for(12345, 1 << 20, [manifest()]) == 12288

"""One table of a model that the daemon holds: rows out of the arena, or read from its file."""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np

from expertd.histogram import Histogram
from expertd.log import log_failure, log_warning
from expertd.tables.row_slots import RowBytes, Rows, RowSlots
from expertd.tables.table_file import TableFile
from expertstore.errors import InvalidInputError, NotFoundError, RecordLostError
from expertstore.pack.table import Table
from expertstore.shared.row_cache import RowPlaces

MAX_ANSWER_BYTES = 2 << 20
"""Of the rows that one call brings: half of what gRPC lets through."""
MAX_ROWS_PER_CALL = 8192

NUM_THREADS = 16
"""Reads in flight: an NVMe's random reads are slow one by one."""

_LEAST_PER_READ, _MOST_PER_READ = 4, 64
"""Blocks that one thread reads in turn: handing a read to another thread costs as much as one."""

_HINTED_AT_ONCE = 256
"""Rows read for hints before one looks whether somebody waits."""


@dataclass
class TableCounters:
    """What happened to a table since its model was loaded. ``hits`` and ``misses`` are of rows."""

    hits: int = 0
    misses: int = 0
    nvme_bytes_read: int = 0
    prefetched: int = 0
    rows_lost: int = 0
    fetch_seconds: Histogram = field(default_factory=Histogram)


class HostedTable:
    """Everything here runs on the event loop, but for the reads themselves."""

    def __init__(self, file: TableFile, arena: memoryview, places: RowPlaces) -> None:
        self.table: Table = file.table
        self.slots = RowSlots(arena, places)
        self.counters = TableCounters()
        self._file = file
        self._threads = ThreadPoolExecutor(NUM_THREADS, "expertd-rows")
        self._reads: dict[int, tuple[asyncio.Future[RowBytes], int]] = {}
        """By block, the read that is under way, and the block's place in it."""
        self._hinted: deque[Rows] = deque()
        self._num_hinted = self._num_waiting = 0
        self._nobody_waits = asyncio.Event()
        self._nobody_waits.set()
        self._hinting: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"HostedTable({self.table.name}, {self.slots}, {len(self._reads)} blocks coming)"

    @property
    def max_rows(self) -> int:
        """How many rows one call can name."""
        return max(1, min(MAX_ROWS_PER_CALL, MAX_ANSWER_BYTES // self.table.row_bytes))

    async def fetch(self, rows: Rows, used: Rows) -> RowBytes:
        """Rows ``[n, row_bytes]`` in the order asked for; ``used`` were found in the arena.

        Raises :class:`InvalidInputError`, :class:`NotFoundError`, :class:`RecordLostError`.
        """
        self._check(rows)
        self.use(used)
        began = time.monotonic()
        distinct, order = np.unique(rows, return_inverse=True)
        missing = self.slots.missing(distinct)
        data = np.empty((len(distinct), self.table.row_bytes), np.uint8)
        data[~missing] = self.slots.copy(distinct[~missing])
        self.slots.touch(distinct[~missing])
        self.counters.hits += int((~missing).sum())
        self.counters.misses += int(missing.sum())
        self._num_waiting += 1
        self._nobody_waits.clear()
        try:
            data[missing] = await self._read(distinct[missing])
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._nobody_waits.set()
        self.counters.fetch_seconds.observe(time.monotonic() - began)
        return data[order]

    def use(self, rows: Rows) -> None:
        """Takes in which rows a worker found in the arena."""
        self._check(rows)
        self.slots.touch(rows)
        self.counters.hits += len(rows)

    def prefetch(self, rows: Rows) -> int:
        """Has rows read that are not here, and does not wait; how many of them.

        Beside other hints at most half of what the arena has room for: what comes for a text must
        not displace what came for the same text.
        """
        self._check(rows)
        distinct = np.unique(rows)
        wanted = distinct[self.slots.missing(distinct)]
        wanted = wanted[: max(0, self.slots.places.num_slots // 2 - self._num_hinted)]
        if len(wanted):
            self._hinted.append(wanted)
            self._num_hinted += len(wanted)
            if self._hinting is None:
                self._hinting = asyncio.create_task(self._read_hinted())
        return len(wanted)

    async def close(self) -> None:
        """Ends hints, waits for reads under way; twice is harmless."""
        if self._hinting is not None:
            self._hinting.cancel()
            await asyncio.gather(self._hinting, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._file.close()

    def _check(self, rows: Rows) -> None:
        if len(rows) > self.max_rows:
            raise InvalidInputError(
                f"{len(rows)} rows of {self.table.name} are asked for at once; ask for at most "
                f"{self.max_rows}."
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.table.num_rows:
            outside = int(rows[(rows < 0) | (rows >= self.table.num_rows)][0])
            raise NotFoundError(
                f"{self.table.name} has no row {outside}: it has {self.table.num_rows}."
            )

    async def _read(self, rows: Rows) -> RowBytes:
        """Rows that are not here ``[n, row_bytes]``; they are put into the arena."""
        if not len(rows):
            return np.empty((0, self.table.row_bytes), np.uint8)
        blocks, which = np.unique(rows // self.table.rows_per_block, return_inverse=True)
        self._begin(blocks)
        coming = [self._reads[block] for block in blocks.tolist()]
        # All of a run's blocks at once: there may be thousands.
        runs = {run: await asyncio.shield(run) for run in dict.fromkeys(run for run, _ in coming)}
        starts = dict(zip(runs, accumulate(map(len, runs.values()), initial=0), strict=False))
        blocks_at = np.array([starts[run] + index for run, index in coming])
        by_block = np.concatenate([*runs.values()])
        data: RowBytes = by_block[blocks_at[which], rows % self.table.rows_per_block]
        self.slots.put(rows, data)
        return data

    def _begin(self, blocks: Rows) -> None:
        """Begins to read blocks, but for those that are being read."""
        new = np.array([block for block in blocks.tolist() if block not in self._reads], np.int64)
        loop = asyncio.get_running_loop()
        length = max(_LEAST_PER_READ, min(_MOST_PER_READ, -(-len(new) // NUM_THREADS)))
        for start in range(0, len(new), length):
            part = new[start : start + length]
            run = loop.run_in_executor(self._threads, self._file.read, part)
            for index, block in enumerate(part.tolist()):
                self._reads[block] = run, index
            run.add_done_callback(partial(self._done, part))

    def _done(self, blocks: Rows, run: asyncio.Future[RowBytes]) -> None:
        for block in blocks.tolist():
            del self._reads[block]
        if run.cancelled() or run.exception() is not None:
            self.counters.rows_lost += len(blocks) * self.table.rows_per_block
        else:
            self.counters.nvme_bytes_read += len(blocks) * self.table.block_bytes

    async def _read_hinted(self) -> None:
        try:
            while self._hinted:
                rows = self._hinted.popleft()
                self._num_hinted -= len(rows)
                while len(rows):
                    part, rows = rows[:_HINTED_AT_ONCE], rows[_HINTED_AT_ONCE:]
                    await self._read_part(part)
        finally:
            self._hinting = None

    async def _read_part(self, rows: Rows) -> None:
        await self._nobody_waits.wait()  # demand before hints
        rows = rows[self.slots.missing(rows)]
        try:
            await self._read(rows)
        except RecordLostError as error:
            # Whoever asks for it is told.
            log_warning("hinted rows lost", table=self.table.name, cause=error)
        except Exception:  # a bug of ours; other hints go on
            log_failure("reading rows ahead")
        else:
            self.counters.prefetched += len(rows)

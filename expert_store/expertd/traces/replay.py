"""What hit rate a policy would have had on a trace, and what the best possible is.

The policies are the daemon's own (:mod:`expertd.residency`), driven as the daemon drives them:
a row's experts are held together; what is missing comes in, in place of the coldest of what is
not held; the policy hears of accesses late, when room is next needed. What differs: reads take
no time, all records have one size, and no worker stands still.
"""

import heapq
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expertd.residency import Entries, Policy
from expertstore.errors import TraceError
from expertstore.trace import Phase, TraceModel, TraceReader

_NEVER = np.iinfo(np.int64).max
_ROWS_PER_TICK = 500
_MAX_PENDING = 1 << 14  # touches: what a session's ring holds

Tick = Callable[[int], None]
"""Called now and then with the number of rows done since the last call."""


@dataclass(frozen=True)
class Trace:
    """A trace in memory, a few bytes an access. Row ``i`` is ``entries[starts[i]:starts[i+1]]``."""

    model: TraceModel
    entries: Entries
    starts: npt.NDArray[np.int64]
    is_decode: npt.NDArray[np.bool_]
    streams: npt.NDArray[np.int64]
    num_lost: int

    @property
    def num_rows(self) -> int:
        """Accesses."""
        return len(self.is_decode)

    def rows(self) -> Iterator[Entries]:
        """The entries of each row."""
        bounds = self.starts.tolist()
        for start, end in pairwise(bounds):
            yield self.entries[start:end]

    def played_by(self, num_workers: int) -> "Trace":
        """The same rows, by so many workers at once, each beginning elsewhere, a row each in turn.

        Worker ``w`` begins at the first decoded token after ``w / num_workers`` of them, and goes
        on at the beginning when it is through. Only for the trace of one session.
        """
        # A decoded token begins with the first layer.
        begins = np.flatnonzero(
            self.is_decode & (self.entries[self.starts[:-1]] < self.model.num_experts[0])
        )
        if not len(begins):
            begins = np.zeros(1, np.int64)
        begins = begins[len(begins) * np.arange(num_workers) // num_workers]
        begins[0] = 0
        order = ((begins + np.arange(self.num_rows)[:, None]) % self.num_rows).reshape(-1)
        rows = list(self.rows())
        lengths = np.diff(self.starts)[order]
        return Trace(
            self.model,
            np.concatenate([rows[row] for row in order]),
            np.concatenate([[0], np.cumsum(lengths)]),
            self.is_decode[order],
            np.tile(np.arange(num_workers), self.num_rows),
            self.num_lost * num_workers,
        )


@dataclass(frozen=True)
class HitRates:
    """Hits per access. ``decode`` is None if nothing was decoded, ``lifetime`` has prefill too."""

    decode: float | None
    lifetime: float


def read_trace(path: Path, progress: Callable[[int, int], None] | None = None) -> Trace:
    """The trace in file ``path``; ``progress`` hears of bytes done and bytes in all.

    Raises :class:`TraceError`.
    """
    entries, starts, decode = array("i"), array("q", [0]), array("b")
    streams = array("q")
    with TraceReader(path) as reader:
        first = np.cumsum([0, *reader.model.num_experts]).tolist()
        for row in reader:
            entries.extend(first[row.layer] + expert for expert in row.experts)
            starts.append(len(entries))
            decode.append(row.phase is Phase.DECODE)
            streams.append(row.session)
            if progress is not None and len(decode) % _ROWS_PER_TICK == 0:
                progress(reader.position_bytes, reader.size_bytes)
        if not decode:
            raise TraceError(f"{path} has no rows; nothing was used.")
        return Trace(
            reader.model,
            np.array(entries, np.int64),
            np.array(starts),
            np.array(decode, np.bool_),
            np.array(streams),
            reader.num_lost,
        )


def replay(trace: Trace, policy: Policy, num_slots: int, tick: Tick | None = None) -> HitRates:
    """The hit rates of a store with room for ``num_slots`` records, empty at first.

    A row of more is used in waves of ``num_slots``, as a worker would.
    """
    resident = np.zeros(trace.model.num_entries, np.bool_)
    free = num_slots
    hits = array("i")
    streams = trace.streams.tolist()
    pending: dict[int, list[Entries]] = {}
    num_pending = 0
    for number, row in enumerate(trace.rows()):
        num_hits = 0
        for start in range(0, len(row), num_slots):
            wave = row[start : start + num_slots]
            here = int(np.count_nonzero(resident[wave]))
            num_hits += here
            missing = len(wave) - here
            if missing > free:
                _tell(policy, pending)
                num_pending = 0
                held, resident[wave] = resident[wave], False
                coldest = policy.coldest(np.flatnonzero(resident))[: missing - free]
                resident[coldest] = False
                resident[wave] = held
                free += len(coldest)
            if missing:
                resident[wave] = True
                free -= missing
        hits.append(num_hits)
        pending.setdefault(streams[number], []).append(row)
        num_pending += len(row)
        if num_pending > _MAX_PENDING:
            _tell(policy, pending)
            num_pending = 0
        if tick is not None and number % _ROWS_PER_TICK == _ROWS_PER_TICK - 1:
            tick(_ROWS_PER_TICK)
    return _rates(trace, np.array(hits))


def replay_optimum(trace: Trace, num_slots: int, tick: Tick | None = None) -> HitRates:
    """The hit rates of who knows the future, under the same rules as :func:`replay`.

    Belady's MIN: for what is missing goes what is used again last, but nothing that the row
    itself uses, and every miss is brought in. That makes the fewest misses over all rows; of
    decode rows alone a policy could in principle make fewer, at prefill's cost.
    """
    uses = _next_rows(trace)
    bounds = trace.starts.tolist()
    until: dict[int, int] = {}  # of resident records, the row that uses them next
    queue: list[tuple[int, int]] = []  # (-row, entry), with some that are out of date
    hits = array("i")
    for number, row in enumerate(trace.rows()):
        num_hits = 0
        entries, nexts = row.tolist(), uses[bounds[number] : bounds[number + 1]].tolist()
        for start in range(0, len(entries), num_slots):
            wave = entries[start : start + num_slots]
            num_hits += sum(entry in until for entry in wave)
            # Out of the queue's sight while they are held: no entry there is up to date.
            held = [entry for entry in wave if entry in until]
            for entry in held:
                del until[entry]
            while len(until) + len(wave) > num_slots:
                row_of_use, entry = heapq.heappop(queue)
                if until.get(entry) == -row_of_use:
                    del until[entry]
            for entry, used in zip(wave, nexts[start : start + num_slots], strict=True):
                until[entry] = used
                heapq.heappush(queue, (-used, entry))
        hits.append(num_hits)
        if tick is not None and number % _ROWS_PER_TICK == _ROWS_PER_TICK - 1:
            tick(_ROWS_PER_TICK)
    return _rates(trace, np.array(hits))


def _tell(policy: Policy, pending: dict[int, list[Entries]]) -> None:
    """What the sessions' rings hold, one after the other."""
    for stream, rows in pending.items():
        policy.touch(np.concatenate(rows), stream)
    pending.clear()


def _next_rows(trace: Trace) -> npt.NDArray[np.int64]:
    """Per access, the row in which its entry is used next."""
    rows = np.repeat(np.arange(trace.num_rows), np.diff(trace.starts))
    order = np.lexsort((rows, trace.entries))
    nexts = np.full(len(rows), _NEVER)
    same = trace.entries[order[:-1]] == trace.entries[order[1:]]
    nexts[order[:-1][same]] = rows[order[1:][same]]
    return nexts


def _rates(trace: Trace, hits: npt.NDArray[np.int32]) -> HitRates:
    uses = np.diff(trace.starts)
    decode = trace.is_decode
    return HitRates(
        float(hits[decode].sum() / uses[decode].sum()) if decode.any() else None,
        float(hits.sum() / uses.sum()),
    )

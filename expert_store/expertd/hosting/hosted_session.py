"""A session as the daemon sees it: one attached process, what it may do, what it holds."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from expertd.hosting.hosted_model import HostedModel, RecordKey
from expertd.hosting.patience import GRACE_SECONDS
from expertd.hosting.tally import Tally
from expertd.memory.memfd import SharedMemory
from expertd.residency import Entries
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.shared.handshake import Role
from expertstore.shared.session_page import MISSED, SessionPage, session_page_bytes

MAX_FETCHES_IN_FLIGHT = 8
MAX_LEASES = 64
_MAX_ROUND = 1 << 32
_MAX_GAP_SECONDS = 0.05
_NOTHING: Entries = np.zeros(0, np.int64)


class Connection(Protocol):
    """The attach connection, as far as a session needs it."""

    def nudge(self) -> None:
        """Asks the worker to publish its epoch; never waits."""

    def close(self) -> None:
        """Hangs up; twice is harmless."""


class UserTally:
    """What the sessions of one user keep from being evicted, of all models."""

    def __init__(self) -> None:
        self.pinned: Tally[RecordKey] = Tally(_record_bytes)
        self.all: Tally[RecordKey] = Tally(_record_bytes)
        """Pins, leases, and what fetches and pins under way want."""


class HostedSession:
    """Alive as long as its attach connection. Only a worker's has a model and a page."""

    def __init__(
        self,
        number: int,
        token: str,
        role: Role,
        pid: int,
        uid: int,
        connection: Connection,
        model: HostedModel | None,
        kept: UserTally | None = None,
    ) -> None:
        """``kept`` is that of the session's user, of whom there may be other sessions."""
        self.id, self.token, self.role, self.pid, self.uid = number, token, role, pid, uid
        self.connection = connection
        self.attached_at = time.monotonic()
        self.closed = False
        self.has_called = False
        """Whether a call with its token was answered: before that, it reads nothing."""
        self.pins: set[int] = set()
        self.fetches_in_flight = 0
        self._asked: list[Collection[int]] = []
        self._kept = kept or UserTally()
        self.bytes_read = 0
        self.records_in_pack = 0
        self._model = model
        self._leases: dict[int, list[int]] = {}
        self._last_fetch = 0
        self._tail = 0
        self._misses = 0
        self._counted_misses = 0
        self._hits = 0
        self._leases_ended = 0
        self._progress = (0, 0)
        self._asked_at: float | None = None
        self._stalled = 0.0
        if model is not None:
            self.memory = SharedMemory("expertd-session", session_page_bytes(), 0o600)
            self.page = SessionPage.format(self.memory.view, model.directory.epoch)
            self._ring = np.frombuffer(self.page.ring, np.uint32)
            model.num_sessions += 1

    def __repr__(self) -> str:
        name = self._model.name if self._model else "-"
        return f"HostedSession({self.id}, {self.role}, pid {self.pid}, {name}, {self._leases})"

    @property
    def model(self) -> HostedModel:
        """The worker's model. Raises :class:`PreconditionError` for other roles."""
        if self._model is None:
            raise PreconditionError(f"this is a session for {self.role}; attach to a model first.")
        return self._model

    @property
    def is_worker(self) -> bool:
        """Whether this session maps the arena."""
        return self._model is not None

    @property
    def model_name(self) -> str:
        """The worker's model, empty for other roles."""
        return self._model.name if self._model else ""

    @property
    def host_hits(self) -> int:
        """Its accesses, as far as they were taken in, that found the record in RAM."""
        return self._hits

    @property
    def nvme_misses(self) -> int:
        """Its accesses, as far as they were taken in, that had to wait for the record."""
        return self._counted_misses

    @property
    def epoch_lag(self) -> int:
        """Evictions whose records this session might still read."""
        if self._model is None:
            return 0
        return max(0, self._model.directory.epoch - self.page.epoch)

    @property
    def leased(self) -> set[RecordKey]:
        """What is leased to it."""
        return {RecordKey(self.model, entry) for lease in self._leases.values() for entry in lease}

    @property
    def kept_bytes(self) -> int:
        """Size of a worker's pins and leases, and of those that it will have; else 0."""
        if not self.is_worker:
            return 0
        kept = self.pins.union(*self._leases.values(), *self._asked)
        return sum(map(self.model.record_bytes, kept))

    @contextmanager
    def asks(self, entries: Collection[int]) -> Iterator[None]:
        """Counts what a fetch or pin under way wants as kept by its user, inside the ``with``."""
        records = self._records(entries)
        self._asked.append(entries)
        self._kept.all.add(records)
        try:
            yield
        finally:
            self._asked.remove(entries)
            self._kept.all.remove(records)

    def begin_fetch(self, number: int) -> None:
        """Registers a fetch's number; numbers only grow, or leases could not be told apart."""
        if number <= self._last_fetch:
            raise InvalidInputError(
                f"fetch number {number} was used: the last was {self._last_fetch}."
            )
        if self.fetches_in_flight >= MAX_FETCHES_IN_FLIGHT:
            raise PreconditionError(
                f"session {self.id} has {self.fetches_in_flight} fetches in flight; wait for one."
            )
        # A client releases before it fetches again: more are a leak, and fill our memory.
        self._end_released()
        if len(self._leases) >= MAX_LEASES:
            raise PreconditionError(
                f"session {self.id} has {len(self._leases)} fetches leased; release them first."
            )
        self._last_fetch = number
        self.fetches_in_flight += 1

    def lease(self, number: int, entries: list[int]) -> None:
        """Takes over the holds of ``entries`` until the worker releases that fetch."""
        if entries:
            self._leases[number] = entries
            self._kept.all.add(self._records(entries))

    def refresh(self) -> None:
        """Reads the page: ends released leases, takes in touches."""
        if not self.is_worker:
            return
        self._end_released()
        self._drain_ring()

    def stalled_seconds(self, now: float) -> float:
        """How long it has given nothing up while somebody waits for it; call while waiting."""
        # Only what frees something counts: a page whose numbers merely move is no progress.
        epoch = max(self._progress[0], min(self.page.epoch, self.model.directory.epoch))
        progress = (epoch, self._leases_ended)
        if progress != self._progress or self._asked_at is None:
            self._progress, self._stalled = progress, 0.0
        else:
            # A longer gap is a pause of ours or of the whole host, not the worker's doing.
            self._stalled += min(now - self._asked_at, _MAX_GAP_SECONDS)
        self._asked_at = now
        return self._stalled

    @property
    def stands_still(self) -> bool:
        """Whether, when somebody last waited for it, that was in vain for longer than one waits."""
        return self._asked_at is not None and self._stalled > GRACE_SECONDS

    def not_awaited(self) -> None:
        """Nobody waits for this session: it may stand still as long as it likes."""
        self._asked_at = None

    @property
    def holds_leases(self) -> bool:
        """Whether fetched records are still leased to it."""
        return bool(self._leases)

    def nudge(self) -> None:
        """Asks the worker to publish its epoch."""
        self.connection.nudge()

    def revoke(self) -> None:
        """Tells a worker that what it reads from now on may change; before any byte does."""
        if self.is_worker and not self.closed:
            self.page.revoke()

    def close(self) -> None:
        """Ends the session: drops all it held. Twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.connection.close()
        if self._model is None:
            return
        self._drain_ring()
        for number in list(self._leases):
            self._end_lease(number)
        self.unpin(self.pins.copy())
        self._model.num_sessions -= 1
        self._model.heat.leave(self.id)
        for watch in self._model.watches:
            watch.offer(self.id, _NOTHING, ended=True)
        del self._ring, self.page
        self.memory.close()

    def pin(self, entries: Sequence[int]) -> None:
        """Holds ``entries``, which must not be pinned yet, until they are unpinned."""
        self.model.hold_pinned(entries)
        self.pins.update(entries)
        records = self._records(entries)
        self._kept.pinned.add(records)
        self._kept.all.add(records)

    def unpin(self, entries: Iterable[int]) -> int:
        """Drops pins; those not pinned are ignored."""
        unpinned = self.pins.intersection(entries)
        self.pins -= unpinned
        self.model.unhold_pinned(unpinned)
        records = self._records(unpinned)
        self._kept.pinned.remove(records)
        self._kept.all.remove(records)
        return len(unpinned)

    def _end_released(self) -> None:
        released = self.page.released_fetch
        for number in [number for number in self._leases if number <= released]:
            self._end_lease(number)
            self._leases_ended += 1

    def _end_lease(self, number: int) -> None:
        entries = self._leases.pop(number)
        self.model.unhold(entries)
        self._kept.all.remove(self._records(entries))

    def _records(self, entries: Iterable[int]) -> list[RecordKey]:
        model = self.model
        return [RecordKey(model, entry) for entry in entries]

    def _drain_ring(self) -> None:
        # Misses first: the worker stores them last, so a write in between can only make
        # them too few this time; the next then takes them out of the hits counted before.
        misses, head = self.page.num_misses, self.page.num_touches
        count, capacity = head - self._tail, self.page.ring_entries
        missed = misses - self._misses
        self._tail, self._misses = head, misses
        if not (0 <= count <= _MAX_ROUND and 0 <= missed <= count + self._hits):
            return  # counters that run backwards or leap are a lie: nothing of this is believed
        if not count and not missed:
            return
        self._hits += count - missed
        self._counted_misses += missed
        readable = min(count, capacity)
        start = (head - readable) % capacity
        raw = self._ring[np.arange(start, start + readable) % capacity]
        entries: Entries = (raw & np.uint32(MISSED - 1)).astype(np.int64)
        entries = entries[entries < self.model.num_entries]
        self.model.touched(entries, count, missed, self.id)


def _record_bytes(record: RecordKey) -> int:
    return record.model.record_bytes(record.entry)

"""Someone who watches which experts the sessions use: what is yet to be sent to them."""

import asyncio
from collections import deque
from typing import NamedTuple

import numpy as np

from expertd.residency import Entries

MAX_WATCHERS = 8
"""Of one model at once: each gets a copy of all its touches."""
MAX_WAITING_TOUCHES = 1 << 20
"""A watcher that is further behind loses what comes, and is told how much: 8 MiB at most."""
_MAX_BATCHES = 1 << 14
_NOTHING: Entries = np.zeros(0, np.int64)


class TouchBatch(NamedTuple):
    """Accesses of one session, in order. ``num_lost`` were lost just before these."""

    session: int
    entries: Entries
    num_lost: int
    ended: bool
    """Whether the session has ended with them."""


class TouchWatch:
    """A queue of what one watcher has yet to be told. On the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[TouchBatch] = deque()
        self._num_waiting = 0
        self._lost: dict[int, int] = {}
        self._wake = asyncio.Event()
        self.closed = False

    def offer(
        self, session: int, entries: Entries, num_lost: int = 0, *, ended: bool = False
    ) -> None:
        """Takes a session's accesses, or counts them as lost if too much waits already."""
        if (
            self._num_waiting + len(entries) > MAX_WAITING_TOUCHES
            or len(self._waiting) >= _MAX_BATCHES
        ):
            self._lost[session] = self._lost.get(session, 0) + num_lost + len(entries)
            return
        num_lost += self._lost.pop(session, 0)
        if len(entries) or num_lost or ended:
            self._waiting.append(TouchBatch(session, entries, num_lost, ended))
            self._num_waiting += len(entries)
            self._wake.set()

    def close(self) -> None:
        """Nothing more will come."""
        self.closed = True
        self._wake.set()

    async def take(self, timeout_seconds: float) -> TouchBatch | None:
        """The next batch; None if none came in that time or the watch is closed and empty."""
        if not (self._waiting or self._lost or self.closed):
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), timeout_seconds)
            except TimeoutError:
                return None
        if self._waiting:
            batch = self._waiting.popleft()
            self._num_waiting -= len(batch.entries)
            return batch
        if self._lost:  # their sessions said nothing since
            session = next(iter(self._lost))
            return TouchBatch(session, _NOTHING, self._lost.pop(session), False)
        return None

"""Hints: reading ahead of demand, in what room demand leaves."""

import asyncio
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from expertd.disk.loader import Loader
from expertd.hosting.hosted_model import HostedModel, Load, ModelState
from expertd.hosting.hosted_session import HostedSession
from expertd.hosting.slots import Slots
from expertd.log import log_failure
from expertd.memory.extents import Extent

_TRIES = 20
_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.002


class StartLoad(Protocol):
    """How a read is started: :class:`expertd.hosting.records.Records` does it."""

    def __call__(  # noqa: D102
        self, model: HostedModel, entry: int, extent: Extent, *, hinted: bool
    ) -> Load: ...


@dataclass(eq=False)
class _Hint:
    session: HostedSession
    priority: int
    entries: deque[int]
    num_failures: int = 0


class Prefetcher:
    """One pending hint per session; of the highest priority the sessions take turns, read by read.

    ``depth`` reads may be under way and as many queued behind them, so that the loader has the
    next at hand, and yet a hint that comes waits for few of others.
    """

    def __init__(self, slots: Slots, start_load: StartLoad, loader: Loader, depth: int) -> None:
        self._slots, self._start_load, self._loader = slots, start_load, loader
        self._max_loads = 2 * depth
        self._hints: dict[HostedSession, _Hint] = {}
        self._loads: dict[Load, HostedSession] = {}
        self._turns: dict[HostedSession, int] = {}
        """Per session, the number of its last turn."""
        self._num_turns = 0
        self._to_spare: dict[HostedModel, int] = {}
        """Per model, how many records room is to be made for, once what can be read is."""
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def hint(self, session: HostedSession, entries: list[int], priority: int) -> int:
        """Replaces the session's hint; returns how many of it are neither resident nor loading."""
        model = session.model
        self._supersede(session, set(entries))
        absent = [e for e in entries if not model.is_resident(e) and e not in model.loads]
        if absent:
            self._hints[session] = _Hint(session, priority, deque(absent))
            # For these, and as many of the next hint, which may find the worker reading.
            self._to_spare[model] = 2 * len(absent)
            self._wake.set()
        return len(absent)

    def drop(self, session: HostedSession) -> None:
        """Forgets what the session hinted at and nobody has begun to read."""
        self._supersede(session, ())
        self._turns.pop(session, None)

    async def close(self) -> None:
        """Stops; twice is harmless."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _supersede(self, session: HostedSession, wanted: Collection[int]) -> None:
        self._hints.pop(session, None)
        for load in [load for load, owner in self._loads.items() if owner is session]:
            # A load that demand has joined is no longer a hint's to withdraw.
            if load.entry in wanted or not load.hinted or not self._loader.withdraw(load.job):
                continue
            model = session.model
            del model.loads[load.entry]
            self._slots.free(load.extent)
            model.counters.prefetch_withdrawn += 1
            load.done.set_result("it was a hint that a newer one superseded")

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            num_failed, pause = 0, _FIRST_PAUSE_SECONDS
            while self._hints:
                while len(self._loads) >= self._max_loads:
                    self._make_spare()
                    await asyncio.wait(
                        [load.done for load in self._loads], return_when=asyncio.FIRST_COMPLETED
                    )
                if not self._hints:
                    break
                hint = self._next()
                try:
                    has_room = await self._load_next(hint)
                except Exception:  # a bug of ours, which must not end all prefetching
                    log_failure("prefetching")
                    has_room = True
                    hint.entries.clear()
                if has_room:
                    num_failed, pause = 0, _FIRST_PAUSE_SECONDS
                elif (num_failed := num_failed + 1) >= len(self._hints):
                    self._make_spare()
                    await asyncio.sleep(pause)
                    num_failed, pause = 0, min(2 * pause, _LONGEST_PAUSE_SECONDS)
            self._make_spare()

    def _make_spare(self) -> None:
        """Choosing what to evict takes longer than starting a read: so it comes after."""
        while self._to_spare:
            model, num_records = self._to_spare.popitem()
            try:
                if model.state is ModelState.SERVING:
                    self._slots.make_spare(model, num_records)
            except Exception:  # a bug of ours, which must not end all prefetching
                log_failure("making room for hints")

    def _next(self) -> _Hint:
        """Whose turn it is."""
        hint = min(
            self._hints.values(),
            key=lambda hint: (-hint.priority, self._turns.get(hint.session, 0)),
        )
        self._num_turns += 1
        self._turns[hint.session] = self._num_turns
        return hint

    async def _load_next(self, hint: _Hint) -> bool:
        """Starts the read of the hint's next expert; False if there is no room for it.

        A hint for which there is none again and again is given up.
        """
        async with self._slots.turn():
            if self._hints.get(hint.session) is not hint:
                return True  # superseded, or its session is gone
            model = hint.session.model
            has_room = True
            if hint.entries:
                entry = hint.entries[0]
                if not model.is_resident(entry) and entry not in model.loads:
                    has_room = self._try_load(hint, model, entry)
                if has_room:
                    hint.entries.popleft()
            if not hint.entries or hint.num_failures >= _TRIES:
                del self._hints[hint.session]
            return has_room

    def _try_load(self, hint: _Hint, model: HostedModel, entry: int) -> bool:
        extent = self._slots.try_reserve(model, entry)
        if extent is None:
            hint.num_failures += 1
            return False
        hint.num_failures = 0
        load = self._start_load(model, entry, extent, hinted=True)
        model.counters.prefetch_queued += 1
        self._loads[load] = hint.session
        load.done.add_done_callback(lambda _: self._loads.pop(load, None))
        return True

"""Hints: reading ahead of demand, in what room demand leaves."""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from expertd.disk.loader import Loader
from expertd.hosting.hosted_model import HostedModel, Load
from expertd.hosting.session import Session
from expertd.hosting.slots import Slots
from expertd.log import log_failure
from expertd.shared.extents import Extent

_MAX_LOADS = 2  # one that is read, and one for the loader to go on with
_RETRIES = 20
_RETRY_SECONDS = 0.001


class StartLoad(Protocol):
    """How a read is started: :class:`expertd.hosting.records.Records` does it."""

    def __call__(  # noqa: D102
        self, model: HostedModel, entry: int, extent: Extent, *, hinted: bool
    ) -> Load: ...


@dataclass(eq=False)
class _Hint:
    session: Session
    priority: int
    number: int
    entries: deque[int]


class Prefetcher:
    """One pending hint per session; the highest priority, then the newest, goes first."""

    def __init__(self, slots: Slots, start_load: StartLoad, loader: Loader) -> None:
        self._slots, self._start_load, self._loader = slots, start_load, loader
        self._hints: dict[Session, _Hint] = {}
        self._loads: dict[Load, Session] = {}
        self._models: dict[Load, HostedModel] = {}
        self._count = 0
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def hint(self, session: Session, entries: list[int], priority: int) -> int:
        """Replaces the session's hint; returns how many of it are neither resident nor loading."""
        model = session.model
        self.drop(session)
        absent = [e for e in entries if not model.is_resident(e) and e not in model.loads]
        if absent:
            self._count += 1
            self._hints[session] = _Hint(session, priority, self._count, deque(absent))
            self._wake.set()
        return len(absent)

    def drop(self, session: Session) -> None:
        """Forgets what the session hinted at and nobody has begun to read."""
        self._hints.pop(session, None)
        for load in [load for load, owner in self._loads.items() if owner is session]:
            # A load that demand has joined is no longer a hint's to withdraw.
            if load.hinted and self._loader.withdraw(load.job):
                model = self._models[load]
                del model.loads[load.entry]
                self._slots.free(load.extent)
                model.counters.prefetch_withdrawn += 1
                load.done.set_result("it was a hint that a newer one superseded")

    async def close(self) -> None:
        """Stops; twice is harmless."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._hints:
                hint = max(self._hints.values(), key=lambda hint: (hint.priority, hint.number))
                if not hint.entries:
                    del self._hints[hint.session]
                    continue
                while len(self._loads) >= _MAX_LOADS:
                    await asyncio.wait(
                        [load.done for load in self._loads], return_when=asyncio.FIRST_COMPLETED
                    )
                try:
                    await self._load_next(hint)
                except Exception:  # a bug of ours, which must not end all prefetching
                    log_failure("prefetching")
                    hint.entries.clear()

    async def _load_next(self, hint: _Hint) -> None:
        """Starts the read of the hint's next expert, or gives it up for want of room."""
        for _ in range(_RETRIES):
            async with self._slots.turn():
                if self._hints.get(hint.session) is not hint:
                    return  # superseded, or its session is gone
                model = hint.session.model
                entry = hint.entries[0]
                if model.is_resident(entry) or entry in model.loads:
                    hint.entries.popleft()
                    return
                extent = self._slots.try_reserve(model, entry)
                if extent is not None:
                    hint.entries.popleft()
                    load = self._start_load(model, entry, extent, hinted=True)
                    model.counters.prefetch_queued += 1
                    self._remember(load, model, hint.session)
                    return
            await asyncio.sleep(_RETRY_SECONDS)
        hint.entries.clear()

    def _remember(self, load: Load, model: HostedModel, session: Session) -> None:
        self._loads[load] = session
        self._models[load] = model
        load.done.add_done_callback(lambda _: self._forget(load))

    def _forget(self, load: Load) -> None:
        self._loads.pop(load, None)
        self._models.pop(load, None)

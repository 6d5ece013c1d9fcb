"""Room in the arena: allocating it, and making it by eviction under the epoch rule.

Everything here runs on the event loop, so it needs no lock of its own; reservations of
several records are granted whole and one after the other, which is what keeps two fetches
from each holding half of what both need.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from expertd.extents import PAGE_BYTES, Extent, Extents
from expertd.hosted_model import HostedModel
from expertd.session import Session

_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.002


class NoHoleError(Exception):
    """Nothing is left to evict or to wait for, and no hole is large enough."""


class Slots:
    """The arena's extents and the models and sessions that use them.

    ``cut_off`` ends a session that has stood still for ``stall_seconds`` while others
    wait for what it may still read; it must set the page's ``revoked`` first.
    """

    def __init__(
        self,
        num_bytes: int,
        models: dict[str, HostedModel],
        sessions: dict[str, Session],
        cut_off: Callable[[Session], None],
        stall_seconds: float,
    ) -> None:
        self.extents = Extents(num_bytes)
        self._models = models
        self._sessions = sessions
        self._cut_off = cut_off
        self._stall_seconds = stall_seconds
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Slots({self.extents}, {'busy' if self._turn.locked() else 'idle'})"

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """First come, first served: who is inside may reserve, the others wait."""
        async with self._turn:
            yield

    @property
    def working_set_bytes(self) -> int:
        """What one token of each model uses: the least that must not be pinned."""
        return sum(model.manifest.working_set_bytes for model in self._models.values())

    def free(self, extent: Extent) -> None:
        """Gives back an extent that nobody can have seen, or no longer can."""
        self.extents.free(extent)

    def refresh(self) -> None:
        """Takes in what the sessions wrote: touches, releases, epochs."""
        for session in self._sessions.values():
            session.refresh()
        self._share_time()
        self._collect()

    async def reserve(self, sizes: Sequence[int]) -> list[Extent]:
        """Extents of those sizes, evicting the coldest records of all models for them.

        Call inside a turn. Waits for readers as long as the caller lets it; cancelled, it
        leaves nothing allocated. Raises :class:`NoHoleError`.
        """
        pause = _FIRST_PAUSE_SECONDS
        while True:
            # All or none each time: what is taken early may lie where the rest would fit.
            extents = self._allocate(sizes)
            if len(extents) < len(sizes):
                self.refresh()
                extents = self._allocate(sizes)
            if len(extents) == len(sizes):
                break
            self._evict_for(sum(sizes[len(extents) :]))
            if self._collect():
                continue  # no session could read them: no need to wait
            if self._is_stuck():
                raise NoHoleError
            self._press()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        # Who gave up instead has not ended the wait: the next may wait for the same session.
        for session in self._sessions.values():
            session.not_awaited()
        return extents

    def try_reserve(self, size: int) -> Extent | None:
        """An extent for a hint, if there is one now.

        A hint takes nothing from a running step: only records are evicted that their model's
        last tokens did not use, one for each session and one more. Their bytes come free when
        the readers have moved on, so a later try may succeed where this one did not.
        """
        extent = self.extents.allocate(size)
        if extent is None:
            self.refresh()
            extent = self.extents.allocate(size)
        if extent is None and self._retired_bytes() < size:
            self._evict_for(size, sparing_steps=True)
            self._collect()
            extent = self.extents.allocate(size)
        if extent is None:
            self._nudge()
        return extent

    def _is_stuck(self) -> bool:
        """Whether no eviction, read or lease that is under way can make room."""
        return not any(
            model.reclaimer.bytes_retired or model.loads for model in self._models.values()
        ) and not any(session.holds_leases for session in self._sessions.values())

    def _allocate(self, sizes: Sequence[int]) -> list[Extent]:
        """Extents of those sizes; if not all fit, those that would, but none is allocated."""
        extents: list[Extent] = []
        for size in sizes:
            extent = self.extents.allocate(size)
            if extent is None:
                for taken in extents:
                    self.free(taken)
                break
            extents.append(extent)
        return extents

    def _retired_bytes(self) -> int:
        return sum(model.reclaimer.bytes_retired for model in self._models.values())

    def _evict_for(self, num_bytes: int, *, sparing_steps: bool = False) -> None:
        """Retires the coldest records until what is on its way out makes ``num_bytes``.

        Bytes that are free already do not count: there was no hole large enough in them.
        """
        shortage = num_bytes - self._retired_bytes()
        if shortage <= 0:
            return
        ranked: list[tuple[float, int, HostedModel, int]] = []
        for number, model in enumerate(self._models.values()):
            candidates = model.evictable()
            if sparing_steps and model.num_sessions:
                candidates = model.heat.idle_since(candidates, 1 + model.num_sessions)
            coldest = model.heat.coldest(candidates)[: -(-shortage // PAGE_BYTES)]
            heat = model.heat.of(coldest)
            ranked += zip(
                heat.tolist(), [number] * len(heat), [model] * len(heat), coldest.tolist(),
                strict=True,
            )  # fmt: skip
        ranked.sort(key=lambda row: row[:2])  # stable: within a model the order stays
        chosen: dict[HostedModel, list[int]] = {}
        for _, _, model, entry in ranked:
            if shortage <= 0:
                break
            chosen.setdefault(model, []).append(entry)
            shortage -= model.record_bytes(entry)
        for model, entries in chosen.items():
            model.evict(entries)

    def _share_time(self) -> None:
        """A model's records cool while the others' work, or an idle one would keep its room."""
        if len(self._models) < 2:
            return
        passed = {model: model.heat.take_tokens() for model in self._models.values()}
        total = sum(passed.values())
        for model, tokens in passed.items():
            if total > tokens:
                model.heat.pass_time(total - tokens)

    def _collect(self) -> bool:
        """Frees what no session can read any more; whether that was anything."""
        freed = False
        for model in self._models.values():
            if not model.reclaimer.bytes_retired:
                continue
            for extent in model.reclaimer.collect(self._epochs(model)):
                self.free(extent)
                freed = True
        return freed

    def _epochs(self, model: HostedModel) -> Iterable[int]:
        return [session.page.epoch for session in self._readers(model)]

    def _readers(self, model: HostedModel) -> list[Session]:
        return [
            session
            for session in self._sessions.values()
            if session.is_worker and session.model is model
        ]

    def _laggards(self) -> list[Session]:
        """Sessions that hold back retired records, or have fetched ones leased."""
        return [
            session
            for model in self._models.values()
            for session in self._readers(model)
            if session.holds_leases or model.reclaimer.waits_for(session.page.epoch)
        ]

    def _nudge(self) -> None:
        for session in self._laggards():
            session.nudge()

    def _press(self) -> None:
        """Nudges those who are waited for, and cuts off those who stand still too long."""
        now = asyncio.get_running_loop().time()
        for session in self._laggards():
            if session.stalled_seconds(now) > self._stall_seconds:
                self._cut_off(session)
            else:
                session.nudge()

"""Room in the arena: allocating it, and making it by eviction under the epoch rule.

Everything here runs on the event loop, so it needs no lock of its own; reservations of
several records are granted whole and one after the other, which is what keeps two fetches
from each holding half of what both need.

Whatever fits by size gets room. Eviction makes it in one piece (:mod:`expertd.hosting.eviction`);
where pinned records leave no gap that is large enough, they are moved
(:mod:`expertd.hosting.compaction`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np

from expertd.hosting.budget import Budget
from expertd.hosting.eviction import choose_victims
from expertd.hosting.hosted_model import HostedModel, RecordKey
from expertd.hosting.hosted_session import HostedSession
from expertd.hosting.mover import KeptRecord, Mover
from expertd.memory.extents import Extent, Extents
from expertd.residency import Entries

_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.002
_LOOK_AGAIN_SECONDS = 0.05
_SPARE_SHARE, _MANY_SHARE = 4, 64


class NoSlotError(Exception):
    """There was no room in time, for a fetch that need not wait for it; nothing was taken."""


class Slots:
    """The arena's extents and the models and sessions that use them.

    ``copy`` copies one extent's bytes to another, on any thread. ``cut_off`` ends a session
    that has stood still for ``stall_seconds`` while others wait for what it may still read;
    it must set the page's ``revoked`` first.
    """

    def __init__(
        self,
        budget: Budget,
        copy: Callable[[Extent, Extent], None],
        models: dict[str, HostedModel],
        sessions: dict[str, HostedSession],
        cut_off: Callable[[HostedSession], None],
        stall_seconds: float,
    ) -> None:
        self.extents = Extents(budget.num_bytes)
        self.budget = budget
        self.mover = Mover(self.extents, copy, models)
        self._models = models
        self._sessions = sessions
        self._cut_off = cut_off
        self._stall_seconds = stall_seconds
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Slots({self.extents}, {'busy' if self._turn.locked() else 'idle'})"

    @asynccontextmanager
    async def turn(self, until: float | None = None) -> AsyncIterator[None]:
        """First come, first served: who is inside may reserve, the others wait.

        Raises :class:`NoSlotError` if it is not its turn by ``until``, of the loop's clock.
        """
        try:
            async with asyncio.timeout_at(until):
                await self._turn.acquire()
        except TimeoutError:
            raise NoSlotError from None
        try:
            yield
        finally:
            self._turn.release()

    @property
    def is_taken(self) -> bool:
        """Whether somebody is inside a turn."""
        return self._turn.locked()

    def free(self, extent: Extent) -> None:
        """Gives back an extent that nobody can have seen, or no longer can."""
        self.extents.free(extent)

    def refresh(self) -> None:
        """Takes in what the sessions wrote: touches, releases, epochs."""
        for session in self._sessions.values():
            session.refresh()
        self._share_time()
        self._collect()

    async def reserve(
        self,
        model: HostedModel,
        missing: Sequence[int],
        own: Mapping[int, int] | None = None,
        *,
        to_pin: bool = False,
        until: float | None = None,
    ) -> list[tuple[RecordKey, Extent]]:
        """Extents for missing records of a model, evicting the coldest of all models for them.

        ``own`` says how often the caller holds what it wants of the model, besides pinning it.
        Where nothing else makes room, some records have to leave their place and be read again:
        the caller's own, or those that another model's minimum guards. They get an extent of
        the result too. ``to_pin``: some are pinned, so a hole in which any record can be moved
        is left beside what is.

        Call inside a turn, with what fits by size into the model's budget. Waits for readers as
        long as the caller lets it; cancelled, it leaves nothing allocated. Raises
        :class:`NoSlotError` where it would have to wait for them past ``until``.
        """
        wanted = [RecordKey(model, entry) for entry in missing]
        loop, spare = asyncio.get_running_loop(), list[int]()
        pause, seen, seen_at, on_its_way = _FIRST_PAUSE_SECONDS, (-1, -1, -1), 0.0, False
        while True:
            sizes = [each.record_bytes(entry) for each, entry in wanted] + spare
            # All or none each time: what is taken early may lie where the rest would fit.
            extents = self._allocate(model, wanted, sizes)
            if extents is None:
                self.refresh()
                extents = self._allocate(model, wanted, sizes)
            if extents is not None:
                if spare or not to_pin or self._can_move_beside(extents):
                    break
                for extent in extents:
                    self.free(extent)
                spare = [self._largest_record_bytes]
                continue
            # Looking for victims among very many takes milliseconds: not at every pause.
            state = self._state()
            if state != seen or loop.time() > seen_at + _LOOK_AGAIN_SECONDS:
                self._evict_over_max(model, _bytes_of(model, wanted))
                on_its_way = self._evict_for(model, sizes)
                seen, seen_at = self._state(), loop.time()
            if self._collect():
                continue  # no session could read them: no need to wait
            if not on_its_way and self._is_stuck():
                step = await self.mover.step(self._kept(model, own or {}))
                if isinstance(step, RecordKey):
                    wanted.append(step)
                if step:
                    seen_at, pause = 0.0, _FIRST_PAUSE_SECONDS
                    continue
            self._press()
            if until is not None and loop.time() >= until:
                raise NoSlotError
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        # Who gave up instead has not ended the wait: the next may wait for the same session.
        for session in self._sessions.values():
            session.not_awaited()
        if spare:
            self.free(extents.pop())
        return list(zip(wanted, extents, strict=True))

    def obtainable_records(self, model: HostedModel) -> int:
        """How many of the model's records one fetch could get, if all let go who ever do.

        Of those who stand still nothing is expected, as far as that is known by now.
        """
        if not any(session.stands_still for session in self._sessions.values()):
            return self.budget.max_fetch_records(model)
        self.refresh()
        still = [session for session in self._sessions.values() if session.stands_still]
        held = {record for session in still for record in session.leased}
        taken = sum(other.record_bytes(entry) for other, entry in held if entry not in other.pinned)
        for other in self._models.values():
            if any(other.reclaimer.waits_for(session.page.epoch) for session in still):
                taken += other.reclaimer.bytes_retired
        return self.budget.max_fetch_records(model, taken)

    def try_reserve(self, model: HostedModel, entry: int) -> Extent | None:
        """An extent for a hinted record, if there is one now.

        A hint takes nothing from a running step: only records are evicted that the steps of their
        model's last tokens, one for each session and one more, can spare. Their bytes come free
        when the readers have moved on, so a later try may succeed where this one did not.
        """
        size = model.record_bytes(entry)
        if self.budget.over_max(model, size):
            self._evict_over_max(model, size, sparing_steps=True)
            self._collect()
            if self.budget.over_max(model, size):
                self._nudge()
                return None
        extent = self.extents.allocate(size)
        if extent is None:
            self.refresh()
            extent = self.extents.allocate(size)
        if extent is None and self._retired_bytes() < size:
            self._evict_for(model, [size], sparing_steps=True)
            self._collect()
            extent = self.extents.allocate(size)
        if extent is None:
            self._nudge()
        return extent

    def make_spare(self, model: HostedModel, num_records: int) -> None:
        """Evicts ahead of hints, as :meth:`try_reserve` does, so that such reads find room at once.

        A worker gives up what it reads only at its layer's end: who evicts when a hint has come
        waits for that, and reads while nobody computes any more. At most a
        ``1 / _SPARE_SHARE`` of the budget is kept so.
        """
        size = model.max_record_bytes
        most = self.budget.num_bytes // size
        count = min(num_records, most // _SPARE_SHARE)
        if self.extents.bytes_free + self._retired_bytes() >= count * size:
            return
        self.refresh()
        # For several such hints at a time, if it is but few of all: to choose is what takes time.
        count = max(count, min(4 * num_records, most // _MANY_SHARE))
        while count and not self._evict_for(model, [size] * count, sparing_steps=True):
            count //= 2

    def trim(self, model: HostedModel) -> None:
        """Evicts what a lowered maximum does not allow, as far as nobody holds it."""
        self.refresh()
        self._evict_over_max(model, 0)

    async def close(self) -> None:
        """Waits for copies under way."""
        await self.mover.close()

    @property
    def _largest_record_bytes(self) -> int:
        return max(model.max_record_bytes for model in self._models.values())

    def _can_move_beside(self, extents: Iterable[Extent]) -> bool:
        """Whether pinned records, some of them in ``extents``, leave a gap for any record."""
        placed = {
            model.placed(entry) for model in self._models.values() for entry in model.pinned
        } | {*extents}
        start = 0
        for extent in sorted(extent for extent in placed if extent is not None):
            if extent.offset - start >= self._largest_record_bytes:
                return True
            start = sum(extent)
        return self.extents.bytes_total - start >= self._largest_record_bytes

    def _allocate(
        self, model: HostedModel, wanted: Sequence[RecordKey], sizes: Sequence[int]
    ) -> list[Extent] | None:
        if self.budget.over_max(model, _bytes_of(model, wanted)):
            return None
        return self.extents.allocate_all(sizes)

    def _is_stuck(self) -> bool:
        """Whether no eviction, read or lease that is under way can make room."""
        return not any(
            model.reclaimer.bytes_retired or model.loads for model in self._models.values()
        ) and not any(session.holds_leases for session in self._sessions.values())

    def _retired_bytes(self) -> int:
        return sum(model.reclaimer.bytes_retired for model in self._models.values())

    def _state(self) -> tuple[int, int, int]:
        """What tells whether there may be more to evict than before."""
        evictable = sum(len(model.evictable()) for model in self._models.values())
        return self.extents.bytes_free, self._retired_bytes(), evictable

    def _evict_over_max(
        self, model: HostedModel, num_bytes: int, *, sparing_steps: bool = False
    ) -> None:
        """Retires the model's coldest until it could have ``num_bytes`` more."""
        excess = self.budget.over_max(model, num_bytes) - model.reclaimer.bytes_retired
        if excess <= 0:
            return
        coldest = self._coldest(model, sparing_steps=sparing_steps)
        _, lengths = model.places_of(coldest)
        count = int(np.searchsorted(np.cumsum(lengths), excess)) + 1
        model.evict(coldest[:count].tolist())

    def _evict_for(
        self, model: HostedModel, sizes: Sequence[int], *, sparing_steps: bool = False
    ) -> bool:
        """Retires the coldest records in whose place, with what is free or will be, all fit.

        False, and nothing is retired, if no evictable records make room for all.
        """
        models = list(self._models.values())
        loose = [*self.extents.holes]
        owners, entries, heat, offsets, lengths = [], [], [], [], []
        for number, other in enumerate(models):
            loose += other.reclaimer.extents
            coldest = self._coldest(other, sparing_steps=sparing_steps)
            if other is not model:
                coldest = _beyond_minimum(other, coldest)
            places = other.places_of(coldest)
            owners.append(np.full(len(coldest), number))
            entries.append(coldest)
            if len(models) > 1:  # else they are in order
                heat.append(other.heat.of(coldest))
            offsets.append(places[0])
            lengths.append(places[1])
        # Stable: within a model the order stays. Nearly sorted, so quick.
        order = (
            np.argsort(np.concatenate(heat), kind="stable") if heat else np.arange(len(offsets[0]))
        )
        victims = choose_victims(
            sizes, loose, np.concatenate(offsets)[order], np.concatenate(lengths)[order]
        )
        if victims is None:
            return False
        chosen = order[victims]
        owner, entry = np.concatenate(owners)[chosen], np.concatenate(entries)[chosen]
        for number in np.unique(owner):
            models[number].evict(entry[owner == number].tolist())
        return True

    def _coldest(self, model: HostedModel, *, sparing_steps: bool = False) -> Entries:
        """What may be evicted of a model, coldest first."""
        candidates = model.evictable()
        if sparing_steps and model.num_sessions:
            candidates = model.heat.dispensable(candidates, 1 + model.num_sessions)
        return model.heat.coldest(candidates)

    def _kept(self, model: HostedModel, own: Mapping[int, int]) -> list[KeptRecord]:
        """What is in the way of a model's records: pinned, its caller's own, and guarded ones."""
        kept: list[KeptRecord] = []
        for other in self._models.values():
            for entry in other.held().tolist():
                record = RecordKey(other, entry)
                mine = own.get(entry) if other is model else None
                num_holds = other.pinned.count(entry) + (mine or 0)
                kept.append(KeptRecord(record, num_holds, mine is not None and num_holds == 1))
            if other is not model:
                coldest = self._coldest(other)
                guarded = coldest[len(_beyond_minimum(other, coldest)) :]
                kept += [KeptRecord(RecordKey(other, entry), 0, True) for entry in guarded.tolist()]
        return kept

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

    def _readers(self, model: HostedModel) -> list[HostedSession]:
        """Who may be reading. Not who has only attached, be it a thousand times."""
        return [
            session
            for session in self._sessions.values()
            if session.is_worker and session.model is model and session.has_called
        ]

    def _laggards(self) -> list[HostedSession]:
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


def _bytes_of(model: HostedModel, records: Iterable[RecordKey]) -> int:
    return sum(other.record_bytes(entry) for other, entry in records if other is model)


def _beyond_minimum(model: HostedModel, coldest: Entries) -> Entries:
    """The first of ``coldest``, without which the model still has its minimum."""
    _, lengths = model.places_of(coldest)
    spare = model.resident_bytes - model.minimum_bytes
    return coldest[: int(np.searchsorted(np.cumsum(lengths), spare, side="right"))]

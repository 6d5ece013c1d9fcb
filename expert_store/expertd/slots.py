"""Room in the arena: allocating it, and making it by eviction under the epoch rule.

Everything here runs on the event loop, so it needs no lock of its own; reservations of
several records are granted whole and one after the other, which is what keeps two fetches
from each holding half of what both need.

Whatever fits by size gets room. Eviction makes it in one piece (:mod:`expertd.eviction`);
where pinned records leave no gap that is large enough, they are moved
(:mod:`expertd.compaction`).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np

from expertd.compaction import next_move
from expertd.eviction import choose_victims
from expertd.extents import Extent, Extents
from expertd.hosted_model import HostedModel
from expertd.session import Session

_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.002
_LOOK_AGAIN_SECONDS = 0.05


class Record(NamedTuple):
    """An expert's record of some model."""

    model: HostedModel
    entry: int


class Slots:
    """The arena's extents and the models and sessions that use them.

    ``copy`` copies one extent's bytes to another, on any thread. ``cut_off`` ends a session
    that has stood still for ``stall_seconds`` while others wait for what it may still read;
    it must set the page's ``revoked`` first.
    """

    def __init__(
        self,
        num_bytes: int,
        copy: Callable[[Extent, Extent], None],
        models: dict[str, HostedModel],
        sessions: dict[str, Session],
        cut_off: Callable[[Session], None],
        stall_seconds: float,
    ) -> None:
        self.extents = Extents(num_bytes)
        self._copy = copy
        self._moves: set[asyncio.Task[None]] = set()
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
    def is_taken(self) -> bool:
        """Whether somebody is inside a turn."""
        return self._turn.locked()

    @property
    def working_set_bytes(self) -> int:
        """What one token of each model uses: the least that must not be pinned."""
        return sum(model.manifest.working_set_bytes for model in self._models.values())

    @property
    def pinned(self) -> Counter[Record]:
        """All pinned records, resident or not, and how many pin each."""
        return Counter(
            Record(session.model, entry)
            for session in self._sessions.values()
            for entry in session.pins
        )

    @property
    def pinned_bytes(self) -> int:
        """Their size."""
        return sum(model.record_bytes(entry) for model, entry in self.pinned)

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
        self, wanted: Sequence[Record], own: Iterable[Record] = (), *, to_pin: bool = False
    ) -> list[tuple[Record, Extent]]:
        """An extent for each wanted record, evicting the coldest of all models for them.

        ``own`` are all that the caller holds: where nothing else makes room, some of those that
        nobody else does are evicted, and get an extent of the result too. ``to_pin``: the caller
        pins them, so a hole in which any record can be moved is left beside what is pinned.

        Call inside a turn, with what fits by size beside the pinned records. Waits for
        readers as long as the caller lets it; cancelled, it leaves nothing allocated.
        """
        wanted, own = list(wanted), dict.fromkeys(own, 0 if to_pin else 1)
        loop, spare = asyncio.get_running_loop(), list[int]()
        pause, seen, seen_at, on_its_way = _FIRST_PAUSE_SECONDS, (-1, -1, -1), 0.0, False
        while True:
            sizes = [model.record_bytes(entry) for model, entry in wanted] + spare
            # All or none each time: what is taken early may lie where the rest would fit.
            extents = self.extents.allocate_all(sizes)
            if extents is None:
                self.refresh()
                extents = self.extents.allocate_all(sizes)
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
                on_its_way = self._evict_for(sizes)
                seen, seen_at = self._state(), loop.time()
            if self._collect():
                continue  # no session could read them: no need to wait
            if not on_its_way and self._is_stuck() and await self._compact(wanted, own):
                seen_at, pause = 0.0, _FIRST_PAUSE_SECONDS
                continue
            self._press()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        # Who gave up instead has not ended the wait: the next may wait for the same session.
        for session in self._sessions.values():
            session.not_awaited()
        if spare:
            self.free(extents.pop())
        return list(zip(wanted, extents, strict=True))

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
            self._evict_for([size], sparing_steps=True)
            self._collect()
            extent = self.extents.allocate(size)
        if extent is None:
            self._nudge()
        return extent

    @property
    def _largest_record_bytes(self) -> int:
        return max(model.max_record_bytes for model in self._models.values())

    def _can_move_beside(self, extents: Iterable[Extent]) -> bool:
        """Whether pinned records, some of them in ``extents``, leave a gap for any record."""
        placed = {model.placed(entry) for model, entry in self.pinned} | {*extents}
        start = 0
        for extent in sorted(extent for extent in placed if extent is not None):
            if extent.offset - start >= self._largest_record_bytes:
                return True
            start = sum(extent)
        return self.extents.bytes_total - start >= self._largest_record_bytes

    async def close(self) -> None:
        """Waits for copies under way."""
        await asyncio.gather(*self._moves)

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

    def _evict_for(self, sizes: Sequence[int], *, sparing_steps: bool = False) -> bool:
        """Retires the coldest records in whose place, with what is free or will be, all fit.

        False, and nothing is retired, if no evictable records make room for all.
        """
        models = list(self._models.values())
        loose = [*self.extents.holes]
        for model in models:
            loose += model.reclaimer.extents
        owners, entries, heat, offsets, lengths = [], [], [], [], []
        for number, model in enumerate(models):
            candidates = model.evictable()
            if sparing_steps and model.num_sessions:
                candidates = model.heat.idle_since(candidates, 1 + model.num_sessions)
            coldest = model.heat.coldest(candidates)
            places = model.places_of(coldest)
            owners.append(np.full(len(coldest), number))
            entries.append(coldest)
            heat.append(model.heat.of(coldest))
            offsets.append(places[0])
            lengths.append(places[1])
        if not models:
            return False
        # Stable: within a model the order stays. Nearly sorted, so quick.
        order = np.argsort(np.concatenate(heat), kind="stable")
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

    async def _compact(self, wanted: list[Record], own: dict[Record, int]) -> bool:
        """Moves one record, or makes room for that; False if there is nothing to do but wait.

        To be called when only held records are in the way. Where none can be moved, one of
        ``own`` is evicted, and wanted from then on. ``own`` says how often the caller holds
        each, besides pinning it.
        """
        pinned = self.pinned
        kept: list[tuple[Extent, Record, int]] = []
        for model in self._models.values():
            for entry in model.held().tolist():
                record, extent = Record(model, entry), model.extent(entry)
                num_holds = pinned[record] + own.get(record, 0)
                if model.num_holds(entry) > num_holds:
                    return False  # a call that is about to let go of it
                assert extent is not None
                kept.append((extent, record, num_holds))
        kept.sort(key=lambda row: row[0])
        move = next_move([extent for extent, _, _ in kept], self.extents.bytes_total)
        if move is None:
            for _, record, num_holds in kept:
                if record in own and num_holds == 1:
                    record.model.evict([record.entry])
                    wanted.append(record)
                    return True
            return False
        try:
            self.extents.take(move.target)
        except ValueError:
            return self._clear(move.target)
        _, record, num_holds = kept[move.number]
        await self._move(record, num_holds, move.target)
        return True

    def _clear(self, extent: Extent) -> bool:
        """Evicts what lies in ``extent``; whether that was anything."""
        start, end = extent.offset, extent.offset + extent.num_bytes
        cleared = False
        for model in self._models.values():
            entries = model.evictable()
            offsets, lengths = model.places_of(entries)
            inside = entries[(offsets < end) & (offsets + lengths > start)]
            if len(inside):
                model.evict(inside.tolist())
                cleared = True
        return cleared

    async def _move(self, record: Record, num_holds: int, target: Extent) -> None:
        """Copies a record into ``target``, which is allocated, and shows it there."""
        # To its end, even if the caller goes away: a thread is at the arena's bytes.
        task = asyncio.create_task(self._copy_and_publish(record, num_holds, target))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)
        await asyncio.shield(task)

    async def _copy_and_publish(self, record: Record, num_holds: int, target: Extent) -> None:
        model, entry = record
        source = model.extent(entry)
        assert source is not None
        await asyncio.to_thread(self._copy, source, target)
        # Nobody else allocates meanwhile, so what was copied is still the record's bytes. But
        # its model may have been unloaded, or a thread of ours be reading it, whom no epoch
        # protects.
        if model.extent(entry) == source and model.num_holds(entry) <= num_holds:
            model.move(entry, target)
        else:
            self.free(target)

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

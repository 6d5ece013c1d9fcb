"""Making records resident: fetches, pins, reads. All on the event loop.

What a call does is decided at once and without waiting, on plain data that nothing else
touches; only room (:mod:`~expertd.hosting.slots`) and reads (:mod:`expertd.disk.loader`) are
waited for.
"""

import asyncio
import mmap
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import compress
from typing import NamedTuple

from xxhash import xxh3_64_hexdigest

from expertd.disk.loader import Loader, ReadJob, read_verified
from expertd.hosting.hosted_model import HostedModel, Load, ModelState
from expertd.hosting.hosted_session import HostedSession
from expertd.hosting.patience import seconds_of_patience
from expertd.hosting.prefetcher import Prefetcher
from expertd.hosting.quotas import Quotas
from expertd.hosting.slots import NoSlotError, Slots
from expertd.log import log, log_error
from expertd.memory.arena import Arena
from expertd.memory.extents import Extent
from expertstore.errors import (
    CapacityError,
    DeadlineError,
    PreconditionError,
    RecordLostError,
    SessionLostError,
)

_PINS_AT_ONCE = 8
_PROGRESS_SECONDS = 5.0


class Fetched(NamedTuple):
    """How a fetch was granted: ``num_missed`` of its records were not resident.

    ``in_pack``: nothing is leased, since no slot was to be had; the worker reads these by itself,
    as far as they are not resident when it looks.
    """

    num_missed: int
    in_pack: Sequence[int] = ()


class Records:
    """Moves records of all models between packs and arena."""

    def __init__(
        self,
        arena: Arena,
        slots: Slots,
        loader: Loader,
        quotas: Quotas,
        fetch_seconds: float,
        hint_depth: int,
    ) -> None:
        self._arena, self._slots, self._loader = arena, slots, loader
        self._quotas = quotas
        self._fetch_seconds = fetch_seconds
        self._loop = asyncio.get_running_loop()
        self._finished: deque[tuple[HostedModel, int, str | None]] = deque()
        self._finishing = False
        self._prefetcher = Prefetcher(slots, self._start_load, loader, hint_depth)

    async def fetch(
        self,
        session: HostedSession,
        entries: Sequence[int],
        number: int,
        max_in_pack: int = 0,
        *,
        in_waves: bool = False,
    ) -> Fetched:
        """Makes records resident and leases them to the session under ``number``.

        Or, where slots are not to be had soon (:mod:`expertd.hosting.patience`), sends it to the
        pack, if it can read as many as ``max_in_pack`` there. All or none: raises
        :class:`CapacityError` if they can never be resident together, or, ``in_waves``, if they
        neither are soon nor can be read there; :class:`RecordLostError`, :class:`DeadlineError`.
        """
        model, wanted = session.model, list(dict.fromkeys(entries))
        began = time.monotonic()  # uvloop's own clock counts whole milliseconds
        session.begin_fetch(number)
        held: list[int] = []

        def claim() -> list[int]:
            return self._claim(session, wanted, held)

        try:
            async with self._quotas.admitted(session, wanted):
                missed = 0
                if self._slots.is_taken or not all(map(model.is_resident, wanted)):
                    until = self._patience_ends(model, wanted, max_in_pack, in_waves=in_waves)
                    missed = await self._make_resident(session, claim, until=until)
                else:  # needs no room, and overtakes nobody who waits for some
                    self._check_serving(model)
                    claim()
                session.lease(number, wanted)
            fetched = Fetched(missed)
        except NoSlotError:
            model.unhold(held)
            _check_open(session)
            self._check_serving(model)
            missed = sum(not model.is_resident(entry) for entry in wanted)
            if in_waves and missed > max_in_pack:
                raise CapacityError(
                    f"{missed} experts of {model.name} get no slots soon, and {max_in_pack} can be "
                    f"read from the pack at a time; fetch in waves of {max_in_pack}.",
                    requested=missed,
                    available=max_in_pack,
                    unit="records",
                ) from None
            fetched = Fetched(missed, wanted)
            model.counters.records_in_pack += fetched.num_missed
            session.records_in_pack += fetched.num_missed
        except BaseException:
            model.unhold(held)
            raise
        finally:
            session.fetches_in_flight -= 1
        model.counters.fetch_seconds.observe(time.monotonic() - began)
        return fetched

    async def pin(self, session: HostedSession, entries: Sequence[int]) -> int:
        """Makes records resident and keeps them so; returns how many are newly pinned."""
        pinned: list[int] = []
        try:
            async with self._quotas.admitted(session, entries):
                await self._make_resident(
                    session, lambda: self._claim_pins(session, entries, pinned), to_pin=True
                )
        except BaseException:
            session.unpin(pinned)
            raise
        return len(pinned)

    async def keep(self, model: HostedModel) -> None:
        """Reads what the model itself pins, a few at a time so that fetches come in between.

        A record that is lost is not pinned any more. Ends early if the model is unloaded.
        """
        began = said = self._loop.time()
        entries = sorted(model.pins)
        for start in range(0, len(entries), _PINS_AT_ONCE):
            async with self._slots.turn():
                if model.state is not ModelState.SERVING:
                    return
                some = [e for e in entries[start : start + _PINS_AT_ONCE] if e in model.pins]
                loads = await self._start_loads(model, some, to_pin=True)
            if loads:
                await asyncio.wait([load.done for load in loads])
            model.unpin([load.entry for load in loads if load.done.result() is not None])
            if self._loop.time() - said > _PROGRESS_SECONDS:
                said = self._loop.time()
                log("reading pinned records", model=model.name, done=start, of=len(entries))
        seconds = round(self._loop.time() - began, 1)
        log("pinned records read", model=model.name, records=len(model.pins), seconds=seconds)

    def prefetch(self, session: HostedSession, entries: Sequence[int], priority: int) -> int:
        """Takes a hint, in place of the session's last; returns how many reads it may start."""
        self._check_serving(session.model)
        return self._prefetcher.hint(session, list(dict.fromkeys(entries)), priority)

    def expect(self, session: HostedSession, entries: Sequence[int]) -> None:
        """Begins to read what the session is about to fetch, as far as there is room at once.

        Nothing is leased by it. The call that asks for them takes a millisecond or two to come,
        on cores that are busy: longer than a disk takes to read a record.
        """
        model = session.model
        self._check_serving(model)
        jobs = []
        for entry in dict.fromkeys(entries):
            if (load := model.loads.get(entry)) is not None:
                self._join(model, load)
            elif not model.is_resident(entry):
                if self._slots.is_taken:
                    break  # others wait for room
                extent = self._slots.try_reserve(model, entry)
                if extent is None:
                    break
                jobs.append(self._new_load(model, entry, extent, hinted=False).job)
        self._loader.submit(*jobs)

    async def read(self, model: HostedModel, entry: int) -> bytes:
        """A record's bytes, from the arena if it is resident, else from the pack; verified."""
        # To its end, even if the caller goes away: a thread is at the model's bytes and files.
        return await asyncio.shield(asyncio.create_task(self._read(model, entry)))

    def drop_hint(self, session: HostedSession) -> None:
        """Forgets what the session hinted at."""
        self._prefetcher.drop(session)

    async def close(self) -> None:
        """Stops reading ahead."""
        await self._prefetcher.close()

    def _start_load(self, model: HostedModel, entry: int, extent: Extent, *, hinted: bool) -> Load:
        """Starts reading a record into ``extent``; the load's ``done`` tells how it went."""
        load = self._new_load(model, entry, extent, hinted=hinted)
        self._loader.submit(load.job)
        return load

    def _new_load(self, model: HostedModel, entry: int, extent: Extent, *, hinted: bool) -> Load:
        done: asyncio.Future[str | None] = self._loop.create_future()
        place = model.place(entry)

        def finished(problem: str | None) -> None:
            # Small records end faster than the loop is woken: one wake-up for many. Who finds
            # it on its way has put its own before the loop begins to take them out. By number,
            # not the load, which refers to this: garbage in cycles costs more than reading.
            self._finished.append((model, entry, problem))
            if not self._finishing:
                self._finishing = True
                self._loop.call_soon_threadsafe(self._finish_loads)

        target = self._arena.writable(extent)
        job = ReadJob(place.file, place.offset, target, place.checksum, finished, not hinted)
        load = model.loads[entry] = Load(entry, extent, hinted, done, job)
        return load

    async def _read(self, model: HostedModel, entry: int) -> bytes:
        self._check_serving(model)
        extent = model.extent(entry)
        model.num_reads += 1
        model.hold([entry])
        try:
            if extent is not None:
                checksum = model.place(entry).checksum
                data = await asyncio.to_thread(self._copy_verified, extent, checksum)
                if data is not None:
                    return data
                model.counters.records_damaged += 1
                layer, expert = model.expert(entry)
                log_error("record damaged in RAM", model=model.name, layer=layer, expert=expert)
                if model.num_holds(entry) == 1:  # else a step counts on its being there
                    model.evict([entry])
            return await asyncio.to_thread(self._read_from_pack, model, entry)
        except RecordLostError:
            model.counters.records_lost += 1
            raise
        finally:
            model.unhold([entry])
            model.num_reads -= 1

    def _patience_ends(
        self, model: HostedModel, wanted: Sequence[int], max_in_pack: int, *, in_waves: bool
    ) -> float | None:
        """Until when a fetch waits for slots, by the loop's clock; None: as long as it takes."""
        num_unpinned = sum(entry not in model.pinned for entry in wanted)
        if not max_in_pack or num_unpinned > self._slots.budget.max_fetch_records(model):
            return None  # or it is refused
        patience = seconds_of_patience(
            missing=sum(not model.is_resident(entry) for entry in wanted),
            max_in_pack=max_in_pack,
            wanted=num_unpinned,
            obtainable=self._slots.obtainable_records(model),
            in_waves=in_waves,
        )
        return None if patience is None else self._loop.time() + patience

    async def _make_resident(
        self,
        session: HostedSession,
        claim: Callable[[], Sequence[int]],
        *,
        to_pin: bool = False,
        until: float | None = None,
    ) -> int:
        """Makes resident what ``claim`` holds when it is the session's turn; how many were not.

        If this raises, what was claimed is the caller's to give up. :class:`NoSlotError` is
        raised where slots would have to be waited for past ``until``.
        """
        model = session.model
        self._check_serving(model)
        try:
            async with asyncio.timeout(self._fetch_seconds):
                async with self._slots.turn(until):
                    self._check_serving(model)  # it may have been unloaded while we queued
                    _check_open(session)
                    entries = claim()
                    loads = await self._start_loads(model, entries, to_pin, until)
                if loads:
                    # wait() and not await: a cancelled caller must not cancel what others
                    # wait for too.
                    await asyncio.wait([load.done for load in loads])
        except TimeoutError:
            raise DeadlineError(
                f"the experts of {model.name} were not resident within {self._fetch_seconds:g} s: "
                "other sessions hold on to the arena, or the disk is slow."
            ) from None
        problems = {load.entry: problem for load in loads if (problem := load.done.result())}
        if problems:
            raise self._lost(model, problems)
        _check_open(session)
        return len(loads)

    def _claim(self, session: HostedSession, wanted: list[int], held: list[int]) -> list[int]:
        model = session.model
        budget = self._slots.budget
        count = sum(entry not in model.pinned for entry in wanted)
        most = budget.max_fetch_records(model)
        if count > most:
            raise CapacityError(
                f"{count} experts of {model.name} do not fit at once: its budget holds "
                f"{most} that are not pinned; fetch in waves of {most}.",
                requested=count,
                available=most,
                unit="records",
            )
        model.hold(wanted)
        held += wanted
        return wanted

    def _claim_pins(
        self, session: HostedSession, entries: Sequence[int], pinned: list[int]
    ) -> list[int]:
        model = session.model
        wanted = [entry for entry in dict.fromkeys(entries) if entry not in session.pins]
        new = [entry for entry in wanted if entry not in model.pinned]
        self._slots.budget.check_pins(model, new)
        session.pin(wanted)
        pinned += wanted
        return wanted

    async def _start_loads(
        self,
        model: HostedModel,
        entries: Sequence[int],
        to_pin: bool,
        until: float | None = None,
    ) -> list[Load]:
        """What has to be waited for until all of ``entries``, which are held, are resident."""
        loads = [self._join(model, load) for e in entries if (load := model.loads.get(e))]
        missing = [e for e in entries if not model.is_resident(e) and e not in model.loads]
        if not missing and not to_pin:
            return loads
        reserved = await self._slots.reserve(
            model,
            missing,
            dict.fromkeys(entries, 0 if to_pin else 1),
            to_pin=bool(entries) and (to_pin or not model.pins.isdisjoint(missing)),
            until=until,
        )
        # In one batch, so that the loader can read it in the order of the file.
        started = [self._new_load(*record, extent, hinted=False) for record, extent in reserved]
        self._loader.submit(*[load.job for load in started])
        # Records of another model are among them if they had to make way: nobody waits for those.
        ours = [record.model is model for record, _ in reserved]
        return loads + list(compress(started, ours))

    def _join(self, model: HostedModel, load: Load) -> Load:
        """Demand for a record that is on its way: at once, so that no hint withdraws it."""
        if load.hinted:
            load.hinted = False
            model.counters.prefetch_late += 1
            self._loader.hurry(load.job)
        return load

    def _finish_loads(self) -> None:
        self._finishing = False  # before the first is taken: what comes later wakes the loop again
        while self._finished:
            model, entry, problem = self._finished.popleft()
            self._finish_load(model, model.loads[entry], problem)

    def _finish_load(self, model: HostedModel, load: Load, problem: str | None) -> None:
        model.counters.read_seconds.observe(load.job.seconds)
        if problem is None:
            model.counters.nvme_bytes_read += load.extent.num_bytes
            model.arrive(load)
        else:
            del model.loads[load.entry]
            self._slots.free(load.extent)
            model.counters.records_lost += 1
            layer, expert = model.expert(load.entry)
            log_error("record lost", model=model.name, layer=layer, expert=expert, cause=problem)
        load.done.set_result(problem)

    def _check_serving(self, model: HostedModel) -> None:
        if model.state is not ModelState.SERVING:
            raise PreconditionError(f"model {model.name!r} is being unloaded.")

    def _copy_verified(self, extent: Extent, checksum: str) -> bytes | None:
        data = bytes(self._arena.view[extent.offset : extent.offset + extent.num_bytes])
        return data if xxh3_64_hexdigest(data) == checksum else None

    def _read_from_pack(self, model: HostedModel, entry: int) -> bytes:
        place, size = model.place(entry), model.record_bytes(entry)
        # O_DIRECT wants aligned memory, which an anonymous mapping is.
        with mmap.mmap(-1, size) as pages, memoryview(pages) as buffer:
            problem = read_verified(place.file, place.offset, buffer, place.checksum)
            data = bytes(buffer)
        if problem is not None:
            raise self._lost(model, {entry: problem})
        return data

    def _lost(self, model: HostedModel, problems: dict[int, str]) -> RecordLostError:
        experts = [model.expert(entry) for entry in problems]
        layer, expert = experts[0]
        more = f" and {len(experts) - 1} more" if len(experts) > 1 else ""
        cause = next(iter(problems.values()))
        return RecordLostError(
            f"the record of layer {layer} expert {expert}{more} of {model.name} is lost: {cause}; "
            "restore the file or pack the checkpoint again.",
            experts=experts,
        )


def _check_open(session: HostedSession) -> None:
    if session.closed:
        raise SessionLostError("the session ended while it waited.")

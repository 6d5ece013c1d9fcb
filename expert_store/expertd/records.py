"""Making records resident: fetches, pins, reads. All on the event loop.

What a call does is decided at once and without waiting, on plain data that nothing else
touches; only room (:mod:`expertd.slots`) and reads (:mod:`expertd.loader`) are waited for.
"""

import asyncio
import mmap
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_hexdigest

from expertd.arena import Arena
from expertd.errors import (
    CapacityError,
    DeadlineError,
    PreconditionError,
    RecordLostError,
    SessionLostError,
)
from expertd.extents import Extent
from expertd.hosted_model import HostedModel, Load, ModelState
from expertd.loader import Loader, ReadJob
from expertd.log import log
from expertd.prefetcher import Prefetcher
from expertd.session import Session
from expertd.slots import Slots


class Records:
    """Moves records of all models between packs and arena."""

    def __init__(
        self,
        arena: Arena,
        slots: Slots,
        loader: Loader,
        pinned_bytes: Callable[[], int],
        fetch_seconds: float,
    ) -> None:
        self._arena, self._slots, self._loader = arena, slots, loader
        self._pinned_bytes = pinned_bytes
        self._fetch_seconds = fetch_seconds
        self._loop = asyncio.get_running_loop()
        self._prefetcher = Prefetcher(slots, self._start_load, loader)

    def max_fetch_records(self, model: HostedModel) -> int:
        """How many of the model's records one fetch can make resident together."""
        free = self._slots.extents.bytes_total - self._pinned_bytes()
        return max(0, free) // model.max_record_bytes

    async def fetch(self, session: Session, entries: Sequence[int], number: int) -> int:
        """Makes records resident and leases them to the session under ``number``.

        Returns how many were not resident. All or none: raises :class:`CapacityError` if
        they can never be resident together, :class:`RecordLostError`, :class:`DeadlineError`.
        """
        model = session.model
        session.begin_fetch(number)
        session.fetches_in_flight += 1
        try:
            wanted = list(dict.fromkeys(entries))
            missed = await self._hold_resident(session, model, wanted)
            session.lease(number, wanted)
        finally:
            session.fetches_in_flight -= 1
        return missed

    async def pin(self, session: Session, entries: Sequence[int]) -> int:
        """Makes records resident and keeps them so; returns how many are newly pinned."""
        model = session.model
        wanted = [entry for entry in dict.fromkeys(entries) if entry not in session.pins]
        most = self.max_fetch_records(model) - model.touches_per_token
        if len(wanted) > most:
            raise CapacityError(
                f"{len(wanted)} experts cannot be pinned: beside one token's working set there is "
                f"room for {max(0, most)}.",
                requested=len(wanted),
                available=max(0, most),
                unit="records",
            )
        await self._hold_resident(session, model, wanted)
        doubled = session.pins.intersection(wanted)  # by a call beside this one
        model.unhold(doubled)
        session.pin(wanted)
        return len(wanted) - len(doubled)

    def prefetch(self, session: Session, entries: Sequence[int], priority: int) -> int:
        """Takes a hint, in place of the session's last; returns how many reads it may start."""
        self._check_serving(session.model)
        return self._prefetcher.hint(session, list(dict.fromkeys(entries)), priority)

    async def read(self, model: HostedModel, entry: int) -> bytes:
        """A record's bytes, from the arena if it is resident, else from the pack; verified."""
        extent = model.extent(entry)
        if extent is not None:
            model.hold([entry])
            try:
                data = await asyncio.to_thread(self._copy, extent)
            finally:
                model.unhold([entry])
            if xxh3_64_hexdigest(data) == model.place(entry).checksum:
                return data
            log("record damaged in RAM", model=model.name, expert=model.expert(entry))
        return await asyncio.to_thread(self._read_from_pack, model, entry)

    def drop_hint(self, session: Session) -> None:
        """Forgets what the session hinted at."""
        self._prefetcher.drop(session)

    async def close(self) -> None:
        """Stops reading ahead."""
        await self._prefetcher.close()

    def _start_load(self, model: HostedModel, entry: int, extent: Extent, *, hinted: bool) -> Load:
        """Starts reading a record into ``extent``; the load's ``done`` tells how it went."""
        done: asyncio.Future[str | None] = self._loop.create_future()
        place = model.place(entry)

        def finished(problem: str | None) -> None:
            self._loop.call_soon_threadsafe(self._finish_load, model, load, problem)

        target = self._arena.view[extent.offset : extent.offset + extent.num_bytes]
        job = ReadJob(place.file, place.offset, target, place.checksum, finished, not hinted)
        load = model.loads[entry] = Load(entry, extent, hinted, done, job)
        self._loader.submit(job)
        return load

    async def _hold_resident(self, session: Session, model: HostedModel, entries: list[int]) -> int:
        """Makes records resident and holds each; returns how many were not. All or none."""
        self._check_serving(model)
        self._check_fits(model, entries)
        held: list[int] = []
        try:
            async with asyncio.timeout(self._fetch_seconds):
                missed = await self._hold_or_load(model, entries, held)
            if session.closed:
                raise SessionLostError("the session ended while it waited.")
        except TimeoutError:
            model.unhold(held)
            raise DeadlineError(
                f"no room for {len(entries)} experts of {model.name} within "
                f"{self._fetch_seconds:g} s: other sessions hold on to the arena."
            ) from None
        except BaseException:
            model.unhold(held)
            raise
        return missed

    async def _hold_or_load(self, model: HostedModel, entries: list[int], held: list[int]) -> int:
        async with self._slots.turn():
            self._check_serving(model)  # it may have been unloaded while we queued
            missing = []
            for entry in entries:
                model.hold([entry])
                held.append(entry)
                if not model.is_resident(entry) and entry not in model.loads:
                    missing.append(entry)
            extents = await self._slots.reserve([model.record_bytes(entry) for entry in missing])
            for entry, extent in zip(missing, extents, strict=True):
                self._start_load(model, entry, extent, hinted=False)
        loads = [model.loads[entry] for entry in entries if entry in model.loads]
        if not loads:
            return 0
        for load in loads:
            if load.hinted:
                load.hinted = False
                model.counters.prefetch_late += 1
                self._loader.hurry(load.job)
        # wait() and not await: a cancelled caller must not cancel what others wait for too.
        await asyncio.wait([load.done for load in loads])
        problems = {load.entry: problem for load in loads if (problem := load.done.result())}
        if problems:
            raise self._lost(model, problems)
        return len(loads)

    def _finish_load(self, model: HostedModel, load: Load, problem: str | None) -> None:
        if problem is None:
            model.counters.nvme_bytes_read += load.extent.num_bytes
            model.arrive(load)
        else:
            del model.loads[load.entry]
            self._slots.free(load.extent)
            model.counters.records_lost += 1
            layer, expert = model.expert(load.entry)
            log("record lost", model=model.name, layer=layer, expert=expert, cause=problem)
        load.done.set_result(problem)

    def _check_serving(self, model: HostedModel) -> None:
        if model.state is not ModelState.SERVING:
            raise PreconditionError(f"model {model.name!r} is being unloaded.")

    def _check_fits(self, model: HostedModel, entries: list[int]) -> None:
        most = self.max_fetch_records(model)
        if len(entries) > most:
            raise CapacityError(
                f"{len(entries)} experts of {model.name} do not fit at once: the budget holds "
                f"{most} that are not pinned; fetch in waves of {most}.",
                requested=len(entries),
                available=most,
                unit="records",
            )

    def _copy(self, extent: Extent) -> bytes:
        return bytes(self._arena.view[extent.offset : extent.offset + extent.num_bytes])

    def _read_from_pack(self, model: HostedModel, entry: int) -> bytes:
        place, size = model.place(entry), model.record_bytes(entry)
        # O_DIRECT wants aligned memory, which an anonymous mapping is.
        with mmap.mmap(-1, size) as pages, memoryview(pages) as buffer:
            try:
                place.file.read_into(buffer, place.offset)
            except EOFError:
                raise self._lost(model, {entry: f"{place.file.path} is truncated"}) from None
            except OSError as error:
                problem = f"{place.file.path} could not be read ({error.strerror})"
                raise self._lost(model, {entry: problem}) from error
            data = bytes(buffer)
        if xxh3_64_hexdigest(data) != place.checksum:
            problem = f"its checksum does not match in {place.file.path}"
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

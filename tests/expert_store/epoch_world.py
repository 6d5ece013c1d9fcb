"""A world in which every interleaving of the epoch protocol can be played.

Directory, session page, reclaimer and allocator are the real ones, over byte arrays. Workers
and daemon are automata whose every action is one load or store of shared memory, named as in
docs/protocol.md. :meth:`World.actions` lists what may happen next, :meth:`World.do` lets it
happen and raises :class:`Violation` if a promise of the protocol is broken by it.

A worker runs through its steps; each holds the records of a few entries together. Where workers
look on (``looks_on``), what is absent does not end the holding: they go on to look up, use what
they have found, then fetch the rest, and hold what was fetched and whatever they find besides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from expertd.memory.extents import Extent, Extents
from expertd.memory.reclaim import Reclaimer
from expertstore.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer
from expertstore.shared.directory import (
    ABSENT,
    PAGE_BYTES,
    Directory,
    directory_bytes,
    pack_word,
    unpack_word,
)
from expertstore.shared.session_page import SessionPage, session_page_bytes
from tests.expert_store.epoch_parts import (
    At,
    Desk,
    Nudge,
    Nudged,
    Publish,
    Ref,
    Request,
    Rules,
    Violation,
    Worker,
)

Action = tuple[Any, ...]
"""A name and its arguments; the name is a method of :class:`World`."""


@dataclass
class World:
    """All there is. ``scripts`` are the steps of each worker."""

    scripts: tuple[tuple[tuple[int, ...], ...], ...]
    num_entries: int
    num_slots: int
    rules: Rules = field(default_factory=Rules)
    looks_on: bool = False
    max_cuts: int = 0
    max_moves: int = 0
    max_deaths: int = 0
    """So often may the daemon be killed, anywhere; the next one takes over what it left."""

    def __post_init__(self) -> None:
        self._words = memoryview(bytearray(directory_bytes(self.num_entries))).cast("Q")
        self.directory = Directory.format(self._words, self.num_entries)
        buffers = [bytearray(session_page_bytes(1)) for _ in self.scripts]
        self.pages = [
            SessionPage.format(memoryview(buffer), self.directory.epoch) for buffer in buffers
        ]
        self._page_words = [memoryview(buffer)[:PAGE_BYTES].cast("Q") for buffer in buffers]
        self._trailer_words = memoryview(bytearray(TRAILER_BYTES)).cast("Q")
        self.trailer = ArenaTrailer.format(self._trailer_words)
        self.extents = Extents(self.num_slots * PAGE_BYTES)
        self.reclaimer = Reclaimer()
        self.contents: list[int | None] = [None] * self.num_slots
        self.workers = [Worker(steps) for steps in self.scripts]
        self.desk = Desk(frozenset(range(len(self.scripts))), resident=(None,) * self.num_entries)

    # Snapshots

    def state(self) -> tuple[Any, ...]:
        """All that tells this state from another; hashable."""
        return (
            tuple([worker.state() for worker in self.workers]),
            self.desk.state(),
            tuple(self.contents),
            (self.directory.epoch, *map(self.directory.word, range(self.num_entries))),
            tuple([(page.epoch, page.released_fetch, page.revoked) for page in self.pages]),
            tuple(self.reclaimer._retired),
            tuple(self.extents._free),
            (self.trailer.adoptions, self.trailer.reused_by),
        )

    def restore(self, state: tuple[Any, ...]) -> None:
        """Goes back to a state."""
        workers, desk, contents, words, pages, retired, free, trailer = state
        self._trailer_words[3], self._trailer_words[4] = trailer
        for worker, values in zip(self.workers, workers, strict=True):
            worker.restore(values)
        self.desk = Desk(*desk)
        self.contents[:] = contents
        self._words[2] = words[0]
        for entry, word in enumerate(words[1:]):
            self.directory.publish(entry, word)
        for page, raw, values in zip(self.pages, self._page_words, pages, strict=True):
            page.epoch, page.released_fetch, revoked = values
            raw[6] = int(revoked)
        self.reclaimer = Reclaimer()
        for epoch, extent in retired:
            self.reclaimer.retire(epoch, (extent,))
        self.extents._free = list(free)
        self.extents.bytes_free = sum(extent.num_bytes for extent in free)

    @property
    def is_finished(self) -> bool:
        """Whether every worker has done all its steps, or has been cut off."""
        ends = (At.DONE,) if self.max_deaths else (At.DONE, At.LOST)
        return all(worker.at in ends for worker in self.workers)

    # What may happen

    def do(self, action: Action) -> None:
        """Lets ``action`` happen. Raises :class:`Violation`."""
        step: Callable[..., None] = getattr(self, action[0])
        step(*action[1:])
        for number, worker in enumerate(self.workers):
            for ref in worker.refs:
                if self.contents[ref.offset // PAGE_BYTES] == ref.entry:
                    continue
                if number in self.desk.live:
                    raise Violation(f"worker {number} reads {ref}, which was reused")
                worker.tainted = True

    def actions(self) -> list[Action]:
        """All that may happen next."""
        possible: list[Action] = []
        for number, worker in enumerate(self.workers):
            if self._may_work(number, worker):
                possible.append(("work", number))
            if self._may_nudge(number, worker):
                possible.append(("nudge", number))
        return possible + self._daemon_actions()

    def _may_work(self, number: int, worker: Worker) -> bool:
        if worker.at is At.LOST:
            return bool(self.max_deaths)  # then it attaches again
        if worker.at is At.DONE:
            return False
        if worker.at is At.WAIT:
            return self.pages[number].revoked or number not in self.desk.live
        if worker.at in (At.HOLD, At.LOAD_EPOCH, At.STOP) and self.rules.nudge is Nudge.LOCKED:
            return worker.nudged is Nudged.SLEEP  # else the mutex is taken
        return True

    def _may_nudge(self, number: int, worker: Worker) -> bool:
        if worker.nudged is not Nudged.SLEEP:
            return True
        if number not in self.desk.live or self.pages[number].epoch >= self.directory.epoch:
            return False
        if self.rules.nudge is Nudge.LOADS_FIRST:
            return True
        return not worker.holding and worker.at is not At.STORE_EPOCH

    def _daemon_actions(self) -> list[Action]:
        desk = self.desk
        possible: list[Action] = []
        if desk.num_deaths < self.max_deaths:
            possible.append(("die",))
        possible += [
            ("end_lease", lease)
            for lease in desk.leases
            if self.pages[lease.worker].released_fetch >= lease.number
        ]
        if self.reclaimer.bytes_retired:
            seen = {number for number, _ in desk.seen}
            waiting = sorted(desk.live - seen)
            possible.append(("read_page", waiting[0]) if waiting else ("collect",))
        if desk.cutting is not None:
            possible.append(("finish_cut",))
        elif desk.num_cuts < self.max_cuts and desk.queue:
            possible += [("cut_off", number) for number in desk.live if self._is_awaited(number)]
        if desk.evicting is not None:
            return [*possible, ("finish_eviction",)]
        if desk.loading is not None:
            return [*possible, ("publish_record",)]
        if desk.moving is not None:
            return [*possible, ("finish_move",)]
        if desk.num_moves < self.max_moves and self.extents.bytes_free:
            if not desk.announced and self.rules.announce_first:
                return [*possible, ("announce",)]
            # Leased ones too: what is promised is that they are there, not where.
            possible += [
                ("move", entry) for entry, at in enumerate(desk.resident) if at is not None
            ]
        if not desk.announced and not self.rules.announce_first and desk.has_loaded:
            return [*possible, ("announce",)]
        if not desk.queue:
            return possible
        head = desk.queue[0]
        absent = [entry for entry in head.entries if desk.resident[entry] is None]
        if not absent:
            return [*possible, ("grant",)]
        if self.extents.bytes_free:
            if not desk.announced and self.rules.announce_first:
                return [*possible, ("announce",)]
            return [*possible, ("load", absent[0])]
        if not self.reclaimer.bytes_retired:
            possible += [("evict", victim) for victim in self._evictable(head)]
        return possible

    def _is_awaited(self, number: int) -> bool:
        return self.reclaimer.waits_for(self.pages[number].epoch) or any(
            lease.worker == number for lease in self.desk.leases
        )

    def _evictable(self, head: Request) -> list[int]:
        kept = set(head.entries)
        if self.rules.respect_leases:
            kept.update(entry for lease in self.desk.leases for entry in lease.entries)
        resident = self.desk.resident
        return [
            entry
            for entry in range(self.num_entries)
            if resident[entry] is not None and entry not in kept
        ]

    # The worker

    def work(self, number: int) -> None:
        """The worker's next load or store."""
        getattr(self, f"_{self.workers[number].at.name.lower()}")(
            number, self.workers[number], self.pages[number]
        )

    def _hold(self, number: int, worker: Worker, page: SessionPage) -> None:  # W1
        worker.holding = True
        worker.refs, worker.looked, worker.absent = (), 0, ()
        worker.missed, worker.tainted = False, False
        worker.at = At.EARLY if self.rules.publish is Publish.EARLY_LOAD else At.LOOK

    def _early(self, number: int, worker: Worker, page: SessionPage) -> None:
        worker.epoch = self.directory.epoch
        worker.at = At.LOOK

    def _look(self, number: int, worker: Worker, page: SessionPage) -> None:  # W2
        entries = worker.wanted
        entry = entries[worker.looked]
        worker.looked += 1
        location = unpack_word(self.directory.word(entry))
        if location is not None:
            worker.refs += (Ref(entry, location.offset),)
        else:
            if worker.granted and entry in worker.fetched and number in self.desk.live:
                raise Violation(f"worker {number} was granted {entry}, and it is gone")
            worker.missed = True
            if self.looks_on:
                worker.absent += (entry,)
            if not self.rules.release_first:
                worker.at = At.FETCH
                return
            if not self.looks_on:
                worker.at = At.STOP
                return
        if worker.looked == len(entries):
            worker.at = {
                Publish.QUIESCENT: At.STOP,
                Publish.EARLY_LOAD: At.PUBLISH_HELD,
                Publish.HOLDING: At.LOAD_HELD,
            }[self.rules.publish]

    def _load_held(self, number: int, worker: Worker, page: SessionPage) -> None:
        worker.epoch = self.directory.epoch
        worker.at = At.PUBLISH_HELD

    def _publish_held(self, number: int, worker: Worker, page: SessionPage) -> None:
        page.epoch = worker.epoch
        worker.at = At.STOP

    def _stop(self, number: int, worker: Worker, page: SessionPage) -> None:  # W3
        worker.holding, worker.refs = False, ()
        worker.at = At.RELEASE

    def _release(self, number: int, worker: Worker, page: SessionPage) -> None:
        page.released_fetch = worker.fetches
        worker.granted = False
        worker.at = At.LOAD_EPOCH

    def _load_epoch(self, number: int, worker: Worker, page: SessionPage) -> None:  # W4
        worker.epoch = self.directory.epoch
        worker.at = At.STORE_EPOCH

    def _store_epoch(self, number: int, worker: Worker, page: SessionPage) -> None:  # W4
        page.epoch, worker.epoch = worker.epoch, 0
        # What was found is used, if there was more: that needs the check.
        worker.at = At.FETCH if worker.missed and not self.looks_on else At.CHECK

    def _check(self, number: int, worker: Worker, page: SessionPage) -> None:
        reused = self.trailer.reused_by > worker.number and self.rules.check_number
        if page.revoked or reused:
            worker.at = At.LOST
            return
        if worker.tainted:
            raise Violation(f"worker {number} uses what it read of reused bytes")
        if worker.missed:
            worker.left = worker.absent
            worker.at = At.FETCH
            return
        worker.step, worker.left = worker.step + 1, ()
        worker.at = At.HOLD if worker.step < len(worker.steps) else At.DONE

    def _fetch(self, number: int, worker: Worker, page: SessionPage) -> None:
        if number not in self.desk.live:
            worker.at = At.LOST  # its token is void
            return
        worker.fetches += 1
        request = Request(number, worker.fetches, worker.fetched)
        self.desk.queue += (request,)
        worker.at = At.WAIT

    def _wait(self, number: int, worker: Worker, page: SessionPage) -> None:
        worker.at = At.LOST

    def _lost(self, number: int, worker: Worker, page: SessionPage) -> None:
        """Attaches to the daemon that is there, with a new page, and repeats its step."""
        page.epoch, page.released_fetch = self.directory.epoch, 0
        self._page_words[number][6] = 0
        self.workers[number] = Worker(worker.steps, step=worker.step, number=self.desk.number)
        self.desk.live |= {number}

    def nudge(self, number: int) -> None:
        """The next load or store of the worker's small thread."""
        worker, rule = self.workers[number], self.rules.nudge
        if worker.nudged is Nudged.SLEEP:
            if rule is Nudge.CHECKS_FIRST:  # and it found that the worker does not hold
                worker.nudged = Nudged.LOAD
                return
            worker.nudge_epoch = self.directory.epoch
            worker.nudged = Nudged.STORE if rule is Nudge.LOCKED else Nudged.CHECK
        elif worker.nudged is Nudged.LOAD:
            worker.nudge_epoch = self.directory.epoch
            worker.nudged = Nudged.STORE
        elif worker.nudged is Nudged.CHECK:
            worker.nudged = Nudged.SLEEP if worker.holding else Nudged.STORE
        else:
            self.pages[number].epoch = worker.nudge_epoch
            worker.nudged = Nudged.SLEEP
        if worker.nudged is Nudged.SLEEP:
            worker.nudge_epoch = 0

    # The daemon

    def evict(self, entry: int) -> None:
        """D1, or D2 where the rule is broken."""
        if self.rules.withdraw_first:
            self.directory.withdraw(entry)
            self.desk.evicting = (entry, 0)
        else:
            self.desk.evicting = (entry, self.directory.advance_epoch())

    def finish_eviction(self) -> None:
        """D2, or D1 where the rule is broken."""
        desk = self.desk
        assert desk.evicting is not None
        entry, epoch = desk.evicting
        if epoch:
            self.directory.withdraw(entry)
        else:
            epoch = self.directory.advance_epoch()
        offset = desk.resident[entry]
        assert offset is not None
        self.reclaimer.retire(epoch, [Extent(offset, PAGE_BYTES)])
        desk.evicting = None
        desk.resident = _put(desk.resident, entry, None)

    def move(self, entry: int) -> None:
        """A record's bytes are copied to another slot. D1 follows: its word says so."""
        extent = self.extents.allocate(PAGE_BYTES)
        assert extent is not None
        self.desk.num_moves += 1
        self.desk.has_loaded = True
        self.desk.moving = (entry, extent.offset, 0)
        if self.rules.copy_first:
            self.contents[extent.offset // PAGE_BYTES] = entry
        if self.rules.show_first:
            self.directory.publish(entry, pack_word(extent.offset, 0))
        else:
            self.desk.moving = (entry, extent.offset, self.directory.advance_epoch())

    def finish_move(self) -> None:
        """D2, or D1 where the rule is broken; the old bytes are retired."""
        assert self.desk.moving is not None
        entry, offset, epoch = self.desk.moving
        self.contents[offset // PAGE_BYTES] = entry
        self.directory.publish(entry, pack_word(offset, 0))
        epoch = epoch or self.directory.advance_epoch()
        old = self.desk.resident[entry]
        assert old is not None
        if self.rules.retire_moved:
            self.reclaimer.retire(epoch, [Extent(old, PAGE_BYTES)])
        else:
            self.extents.free(Extent(old, PAGE_BYTES))
        self.desk.moving = None
        self.desk.resident = _put(self.desk.resident, entry, offset)

    def read_page(self, number: int) -> None:
        """D3, one page of it."""
        self.desk.seen += ((number, self.pages[number].epoch),)

    def collect(self) -> None:
        """D3's decision: the bytes are free."""
        epochs = [epoch for number, epoch in self.desk.seen if number in self.desk.live]
        for extent in self.reclaimer.collect(epochs if self.rules.check_epochs else ()):
            self.extents.free(extent)
        self.desk.seen = ()

    def load(self, entry: int) -> None:
        """D4: a slot's bytes are overwritten with another record."""
        extent = self.extents.allocate(PAGE_BYTES)
        assert extent is not None
        self.desk.has_loaded = True
        self.contents[extent.offset // PAGE_BYTES] = entry
        self.desk.loading = (entry, extent.offset)

    def publish_record(self) -> None:
        """The record is complete and becomes visible."""
        assert self.desk.loading is not None
        entry, offset = self.desk.loading
        self.desk.loading = None
        self.desk.resident = _put(self.desk.resident, entry, offset)
        self.directory.publish(entry, pack_word(offset, 0))

    def grant(self) -> None:
        """The head of the queue gets its records, leased."""
        head, *rest = self.desk.queue
        self.desk.queue = tuple(rest)
        self.desk.leases |= {head}
        worker = self.workers[head.worker]
        worker.granted, worker.at = True, At.HOLD

    def end_lease(self, lease: Request) -> None:
        """The daemon sees that the worker has released a fetch."""
        self.desk.leases -= {lease}

    def cut_off(self, number: int) -> None:
        """The first half of ending a session that stands still."""
        self.desk.num_cuts += 1
        self.desk.cutting = number
        if self.rules.revoke_first:
            self.pages[number].revoke()
        else:
            self._forget(number)

    def finish_cut(self) -> None:
        """The second half."""
        number, self.desk.cutting = self.desk.cutting, None
        assert number is not None
        if self.rules.revoke_first:
            self._forget(number)
        else:
            self.pages[number].revoke()

    def die(self) -> None:
        """The daemon is killed, wherever it stands, and the next takes over what is shared.

        One step, since nothing that workers can see is changed by either.
        """
        places = [unpack_word(self.directory.word(entry)) for entry in range(self.num_entries)]
        self.trailer.adopt()
        number = self.trailer.adoptions if self.rules.count_all else self.trailer.reused_by + 1
        self.desk = Desk(
            frozenset(),
            resident=tuple([None if place is None else place.offset for place in places]),
            num_cuts=self.desk.num_cuts,
            num_moves=self.desk.num_moves,
            num_deaths=self.desk.num_deaths + 1,
            number=number,
            announced=False,
        )
        self.reclaimer = Reclaimer()
        self.extents = Extents(self.num_slots * PAGE_BYTES)
        for place in places:
            if place is not None:
                self.extents.take(Extent(place.offset, PAGE_BYTES))

    def announce(self) -> None:
        """Before the first byte is reused: sessions of earlier daemons are void."""
        self.desk.announced = True
        if self.rules.count_all:
            self.trailer.begin_reuse()
        else:
            self._trailer_words[4] = self.desk.number

    def _forget(self, number: int) -> None:
        desk = self.desk
        desk.live -= {number}
        desk.queue = tuple(request for request in desk.queue if request.worker != number)
        desk.leases = frozenset(lease for lease in desk.leases if lease.worker != number)


def _put(values: tuple[int | None, ...], index: int, value: int | None) -> tuple[int | None, ...]:
    return (*values[:index], value, *values[index + 1 :])


assert ABSENT == 0  # so that a state's words can be written back as they are

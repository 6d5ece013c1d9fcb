"""The worker's side of shared memory: the epoch rule and the touches.

``docs/protocol.md`` tells the rule and why it is safe; W1 to W4 here are its steps. A
:class:`Mapping` lives as long as one attach connection. Its methods are called by one
worker thread and, for nudges, by the thread that listens on the attach connection.
"""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from enum import Enum, auto

from expertd_client.arena_mapping import ArenaMapping, address_of
from expertstore.errors import (
    ExpertdError,
    PreconditionError,
    SessionLostError,
    UnavailableError,
)
from expertstore.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer
from expertstore.shared.directory import (
    ABSENT,
    HEADER_WORDS,
    PAGE_BYTES,
    DirectoryView,
    pack_word,
    unpack_word,
)
from expertstore.shared.session_page import SessionPage


class HoldState(Enum):
    """What a session is doing with the arena."""

    IDLE = auto()
    """Holds nothing."""
    FETCHING = auto()
    """Holds nothing, and waits for the daemon."""
    HOLDING = auto()
    """Reads records: nothing may be published."""
    LOST = auto()
    """Cut off by the daemon: nothing in the arena is what it was."""
    LEFT = auto()
    """The daemon has been gone for a while, and the arena is not mapped any more."""
    CLOSED = auto()
    """Detached."""
    FORKED = auto()
    """This is a child process, and the session is its parent's."""


_IDLE, _FETCHING, _HOLDING = HoldState.IDLE, HoldState.FETCHING, HoldState.HOLDING
_OVER = frozenset({HoldState.LOST, HoldState.LEFT, HoldState.CLOSED, HoldState.FORKED})

_REFUSALS: dict[HoldState, tuple[type[ExpertdError], str]] = {
    HoldState.FETCHING: (
        PreconditionError,
        "This session is acquiring in another thread or task; it does one at a time, so "
        "attach once for each.",
    ),
    HoldState.HOLDING: (
        PreconditionError,
        "This session already holds a lease; release it before acquiring the next.",
    ),
    HoldState.LOST: (
        SessionLostError,
        "The daemon ended this session, because it held records for too long while others "
        "waited, because the model was unloaded, or because another daemon has taken over; throw "
        "away what was computed since the last release, reattach, and repeat.",
    ),
    HoldState.LEFT: (
        UnavailableError,
        "The daemon has gone, and this session has let go of its memory; reattach when one "
        "serves again.",
    ),
    HoldState.CLOSED: (PreconditionError, "This session is not attached any more; attach again."),
    HoldState.FORKED: (
        PreconditionError,
        "This session belongs to the process that attached it, and this one was forked from "
        "it; attach in this process.",
    ),
}


class Mapping:
    """Arena, directory and session page, mapped, and what this worker holds of them.

    ``adoption``: the number of the daemon among those that have had the arena.
    """

    def __init__(
        self, arena: ArenaMapping, directory: mmap.mmap, page: mmap.mmap, adoption: int
    ) -> None:
        """Raises ValueError if the directory or the page is of another format."""
        self.arena = arena.everything
        self.arena_address = arena.address
        self.arena_bytes = len(arena.records)
        self.mapped_bytes = len(arena.everything)
        self.annex_bytes = arena.annex.num_bytes
        self.copies: dict[int, int] = {}
        """Directory words of records in the annex, good until the release."""
        self._copied_bytes = 0
        self._arena_mapping: ArenaMapping | None = arena
        self._trailer: ArenaTrailer | None = arena.trailer
        self._adoption = adoption
        view = memoryview(directory)
        self.directory_address = address_of(directory) + HEADER_WORDS * 8
        self._directory = DirectoryView(view.cast("Q"))
        self.num_entries = self._directory.num_entries
        # The entries without the header: an entry's number is its index.
        self._entries = view[HEADER_WORDS * 8 :].cast("Q")
        if self.num_entries > len(self._entries):
            raise ValueError("the directory has more entries than it has room for")
        self._page = SessionPage(memoryview(page))
        self._num_fetches = 0
        self._state = HoldState.IDLE
        self._mutex = threading.Lock()

    def __repr__(self) -> str:
        return f"<Mapping {self._state.name.lower()} {self.arena_bytes} bytes>"

    @classmethod
    def map(
        cls,
        descriptors: Sequence[int],
        *,
        arena_bytes: int,
        directory_bytes: int,
        page_bytes: int,
        adoption: int,
        annex_bytes: int = 0,
        previous: "Mapping | None" = None,
    ) -> "Mapping":
        """Maps the three descriptors, which stay the caller's to close.

        The arena as ``previous`` has it, if it is the same, is used again instead of mapping it
        anew.
        Raises ValueError if they are not what the protocol says, OSError if the system
        refuses to map them.
        """
        sizes = (arena_bytes + TRAILER_BYTES, directory_bytes, page_bytes)
        for descriptor, size in zip(descriptors, sizes, strict=True):
            # Past its end a file is SIGBUS, which no exception handler sees.
            if size <= 0 or os.fstat(descriptor).st_size < size:
                raise ValueError("a shared file is smaller than it is said to be")
        arena, directory, page = descriptors
        mapped = previous.arena_mapping if previous is not None else None
        if mapped is None or not mapped.is_of(arena, arena_bytes):
            mapped = ArenaMapping(arena, arena_bytes, annex_bytes)
        return cls(
            mapped,
            mmap.mmap(directory, directory_bytes, access=mmap.ACCESS_READ),
            mmap.mmap(page, page_bytes, access=mmap.ACCESS_WRITE),
            adoption,
        )

    @property
    def arena_mapping(self) -> ArenaMapping | None:
        """For the next session, if its arena is the same; None once it was let go."""
        return self._arena_mapping

    def before_unmapping(self, call: Callable[[], None]) -> None:
        """See :meth:`expertd_client.Session.before_unmapping`."""
        if self._arena_mapping is None:
            raise state_error(self._state)
        self._arena_mapping.before_unmapping(call)

    @property
    def is_void(self) -> bool:
        """Whether bytes that this session has read may have been reused beneath it.

        The daemon says so in the session page; one that comes after it knows no session's
        page, and says it in the arena, to all that are not its own.
        """
        trailer = self._trailer
        # One that was closed just now does not know.
        return trailer is None or self._page.revoked or trailer.reused_by > self._adoption

    @property
    def state(self) -> HoldState:
        """What the session is doing."""
        return self._state

    def check_attached(self) -> None:
        """Raises if the session is over, what its state says."""
        if self._state in _OVER:
            raise state_error(self._state)

    def try_hold(self, entries: Sequence[int], expected: HoldState = _IDLE) -> list[int]:
        """Starts holding, if all ``entries`` are resident or copied; their directory words.

        If a word is ABSENT, nothing is held. ``expected`` is ``FETCHING`` after a fetch. Raises
        PreconditionError, SessionLostError or UnavailableError where nothing may be acquired.
        """
        # W1. The mutex makes the nudge's "is it holding? then publish" one step: it either
        # sees HOLDING, or has stored its epoch before the loads below, which then see every
        # withdrawal of that epoch. The mutex also keeps those loads behind it.
        with self._mutex:
            if self._state is not expected:
                raise state_error(self._state)
            self._state = _HOLDING
        # W2.
        table = self._entries
        words = [table[entry] for entry in entries]
        if ABSENT in words:
            if self.copies:
                copies = self.copies
                both = zip(entries, words, strict=True)
                words = [word or copies.get(entry, ABSENT) for entry, word in both]
                if ABSENT not in words:
                    return words
            self._stop_holding(expected)
            self.publish()
        return words

    def look_up(self, entries: Sequence[int]) -> list[int]:
        """Further directory words while holding; ABSENT of those that are not resident."""
        # W2 once more. Nothing was published since W1, so what is found now stays as it is
        # until the release, as what was found then.
        if self._state is not _HOLDING:
            self.check_attached()
            raise PreconditionError("This session holds no lease; hold one to look experts up.")
        table = self._entries
        return [table[entry] for entry in entries]

    def copy(self, entry: int, num_bytes: int, read: Callable[[memoryview], None]) -> bool:
        """Has ``read`` fill a part of the annex with a record that :meth:`try_hold` finds there.

        For a session that is fetching. False, and nothing is read, if the annex is full. Raises
        what ``read`` raises, and OSError.
        """
        arena, start = self._arena_mapping, self._copied_bytes
        if arena is None or self._state is not _FETCHING:
            raise state_error(self._state)
        if start + num_bytes > self.annex_bytes:
            return False
        self._copied_bytes += -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        read(arena.annex.part(start, num_bytes))
        self.copies[entry] = pack_word(arena.annex_offset + start, 0)
        return True

    def absent(self, entries: Sequence[int]) -> set[int]:
        """Which of ``entries`` are not resident just now: for hints and counts only."""
        table = self._entries
        return {entry for entry in entries if table[entry] == ABSENT}

    def anything_absent(self) -> bool:
        """Whether any entry is not resident just now."""
        return ABSENT in self._entries[: self.num_entries]

    def enter_pages(self, record_bytes: Sequence[int]) -> threading.Thread:
        """See :meth:`expertd_client.Session.enter_pages`; the bytes are by entry."""
        if self._arena_mapping is None:
            raise state_error(self._state)
        # One that is evicted meanwhile leaves memory of the arena behind, like any other.
        return self._arena_mapping.enter_pages(
            (location.offset, num_bytes)
            for word, num_bytes in zip(self._entries, record_bytes, strict=False)
            if (location := unpack_word(word)) is not None
        )

    def touch(self, entries: Sequence[int], missed: set[int] | frozenset[int]) -> None:
        """Tells the daemon of accesses; ``missed`` are those that had to be fetched."""
        self._page.touch(entries, missed)

    def begin_fetch(self) -> int:
        """The number of a fetch that is about to be sent; all earlier ones are released."""
        with self._mutex:
            if self._state is not _IDLE and self._state is not _FETCHING:
                raise state_error(self._state)
            self._state = _FETCHING
        self._drop_copies()
        # Nobody waits for the daemon while it holds leases of it: that is why there is no
        # deadlock over slots.
        self._page.released_fetch = self._num_fetches
        self.publish()
        self._num_fetches += 1
        return self._num_fetches

    def abandon_fetch(self) -> None:
        """Ends a fetch that failed or is no longer wanted.

        The daemon may still grant it later, and finds it released then.
        """
        with self._mutex:
            if self._state is not _FETCHING:
                return
            self._state = _IDLE
        self._drop_copies()
        self._page.released_fetch = self._num_fetches

    def release(self) -> None:
        """Ends what :meth:`try_hold` began, and the lease of the last fetch with it.

        Raises SessionLostError if the bytes may have changed while they were held.
        """
        # W3 is behind us: the caller has stopped reading.
        if self._copied_bytes:  # asked here: this is the hit path
            self._drop_copies()
        self._stop_holding()
        if self._page.released_fetch != self._num_fetches:
            self._page.released_fetch = self._num_fetches
        self.publish()
        # After the reads: a daemon sets the flag, or its number in the arena's trailer, before
        # it reuses a byte, so whoever has read a reused byte sees it. Loads stay in order on
        # x86-64, elsewhere the mutex above stands between.
        if self.is_void:
            with self._mutex:
                if self._state is _IDLE:
                    self._state = HoldState.LOST
            raise state_error(HoldState.LOST)

    def publish(self) -> None:
        """W4, unless the worker holds: tells the daemon which epoch it has left behind.

        Also the answer to a nudge.
        """
        # Elsewhere than on x86-64, W3 must not sink below the store here: _stop_holding (or
        # whoever stopped holding before a nudge) has dropped the mutex since, and what was
        # read before an unlock is read before the lock that follows it.
        with self._mutex:
            if self._state is _IDLE or self._state is _FETCHING:
                self._page.epoch = self._directory.epoch

    def check_revoked(self) -> None:
        """Raises SessionLostError if the daemon has ended this session, noticed yet or not."""
        with self._mutex:
            if self._state not in _OVER and self.is_void:
                raise state_error(HoldState.LOST)
        self.check_attached()

    def disconnect(self) -> None:
        """The attach connection has ended: the daemon is gone, or has cut this session off.

        If it is gone, nobody moves the records any more, and those that are resident stay
        readable, until a next daemon begins to reuse their bytes, or :meth:`leave`.
        """
        with self._mutex:
            # A worker that holds learns it from release().
            if self._state in (_IDLE, _FETCHING) and self.is_void:
                self._state = HoldState.LOST

    def close(self) -> None:
        """Lets go of the arena; views that were given out keep it mapped."""
        with self._mutex:
            self._state = HoldState.CLOSED
            self._drop_arena()

    def leave(self) -> bool:
        """Lets go of the arena of a daemon that has gone; False while a lease needs it.

        The next daemon may need the RAM, which is free with the last mapping of it.
        """
        with self._mutex:
            if self._state in (_HOLDING, _FETCHING):
                return False
            if self._state not in _OVER:
                self._state = HoldState.LEFT
            self._drop_arena()
            return True

    def _drop_arena(self) -> None:
        # By reference count, not munmap: a view that still exists would read, after that, at
        # an address where nothing or something else is mapped. Directory and page stay until
        # the object goes, for a thread that is in the midst of using them; the arena may be
        # most of the host's RAM.
        self.arena = memoryview(b"")
        self._arena_mapping = self._trailer = None

    def abandon_in_child(self) -> None:
        """After fork, in the child: this worker's epoch and touches are its parent's to write."""
        # The old one may have been locked by a thread that the child does not have.
        self._mutex = threading.Lock()
        self._state = HoldState.FORKED

    def _drop_copies(self) -> None:
        """Gives the annex's memory back: what is held in vain may be needed elsewhere."""
        if self._copied_bytes and self._arena_mapping is not None:
            self._arena_mapping.annex.clear()
        self._copied_bytes = 0
        self.copies.clear()

    def _stop_holding(self, state: HoldState = _IDLE) -> None:
        with self._mutex:
            if self._state is not _HOLDING:
                if self._state is HoldState.CLOSED:
                    # The daemon took the end of the connection for the end of the reading.
                    raise SessionLostError(
                        "This session was detached while it held a lease; throw away what was "
                        "computed from it."
                    )
                raise state_error(self._state)
            self._state = state


def state_error(state: HoldState) -> ExpertdError:
    """What a call raises that the state forbids."""
    kind, message = _REFUSALS[state]
    return kind(message)

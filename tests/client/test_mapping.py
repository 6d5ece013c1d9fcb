"""The epoch rule from the worker's side, over real memfds."""

import os
import sys
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_client.mapping import HoldState, Mapping
from expertstore.errors import PreconditionError, SessionLostError
from expertstore.shared.directory import ABSENT, unpack_word
from expertstore.shared.session_page import MISSED
from tests.client.shared_memory import SharedMemory, shared_memory

NOTHING: frozenset[int] = frozenset()


def test_hold_finds_records_where_they_are(shared: SharedMemory) -> None:
    shared.publish(3, page=5)
    shared.arena[5 * 4096 : 5 * 4096 + 4] = b"abcd"
    mapping = shared.mapping()
    words = mapping.try_hold([3])
    assert words is not None
    location = unpack_word(words[0])
    assert location is not None
    assert bytes(mapping.arena[location.offset :][:4]) == b"abcd"
    assert mapping.state is HoldState.HOLDING


def test_hold_of_absent_holds_nothing_and_publishes(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    epoch = shared.evict(1)
    assert ABSENT in mapping.try_hold([0, 1])
    assert mapping.state is HoldState.IDLE
    assert shared.page.epoch == epoch


def test_no_epoch_is_published_while_holding(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    before = shared.page.epoch
    assert ABSENT not in mapping.try_hold([0])
    epoch = shared.evict(0)
    mapping.publish()  # as a nudge does
    assert shared.page.epoch == before
    mapping.release()
    assert shared.page.epoch == epoch


def test_nudge_while_idle_or_fetching_publishes(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    epoch = shared.evict(0)
    mapping.publish()
    assert shared.page.epoch == epoch
    mapping.begin_fetch()
    epoch = shared.evict(0)
    mapping.publish()
    assert shared.page.epoch == epoch


def test_fetch_numbers_and_their_release(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    assert mapping.begin_fetch() == 1
    assert ABSENT not in mapping.try_hold([0], HoldState.FETCHING)
    assert shared.page.released_fetch == 0
    mapping.release()
    assert shared.page.released_fetch == 1
    assert mapping.begin_fetch() == 2
    mapping.abandon_fetch()
    assert shared.page.released_fetch == 2
    assert mapping.state is HoldState.IDLE
    # One that is repeated, since its records had gone again: the first is released.
    assert mapping.begin_fetch() == 3
    assert ABSENT in mapping.try_hold([5], HoldState.FETCHING)
    assert mapping.begin_fetch() == 4
    assert shared.page.released_fetch == 3


def test_a_fetch_publishes_before_it_waits(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    epoch = shared.evict(0)
    mapping.begin_fetch()
    assert shared.page.epoch == epoch


def test_revoked_while_holding(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    assert ABSENT not in mapping.try_hold([0])
    shared.page.revoke()
    mapping.disconnect()
    with pytest.raises(SessionLostError):
        mapping.release()
    for again in (lambda: mapping.try_hold([0]), mapping.begin_fetch, mapping.check_attached):
        with pytest.raises(SessionLostError):
            again()


def test_disconnected_but_not_revoked_reads_on(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    mapping.disconnect()
    assert ABSENT not in mapping.try_hold([0])
    mapping.release()


def test_two_holds_at_once_are_refused(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    assert ABSENT not in mapping.try_hold([0])
    with pytest.raises(PreconditionError, match="release it"):
        mapping.try_hold([0])
    with pytest.raises(PreconditionError, match="release it"):
        mapping.begin_fetch()
    mapping.release()
    mapping.begin_fetch()
    with pytest.raises(PreconditionError, match="another thread or task"):
        mapping.try_hold([0])


def test_closed_while_holding_is_lost(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    assert ABSENT not in mapping.try_hold([0])
    view = mapping.arena[4096:8192]
    mapping.close()
    mapping.close()
    assert bytes(view) == bytes(4096)  # still mapped
    with pytest.raises(SessionLostError, match="detached"):
        mapping.release()
    with pytest.raises(PreconditionError, match="not attached"):
        mapping.try_hold([0])
    mapping.publish()  # a late nudge
    mapping.disconnect()


def test_closing_unmaps_what_nobody_views(shared: SharedMemory) -> None:
    def num_mapped() -> int:
        with open("/proc/self/maps") as maps:  # noqa: PTH123
            return sum("arena_bytes" in line for line in maps)

    before = num_mapped()
    mapping = shared.mapping()
    view = mapping.arena[:1]
    assert num_mapped() == before + 1
    mapping.close()
    assert num_mapped() == before + 1
    view.release()
    assert num_mapped() == before


def test_arena_and_directory_are_read_only(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    assert mapping.arena.readonly
    with pytest.raises(TypeError):
        mapping.arena[0] = 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_shorter_than_said_is_refused(shared: SharedMemory, which: int) -> None:
    short = os.memfd_create("short")
    descriptors = list(shared.descriptors)
    descriptors[which] = short
    with pytest.raises(ValueError, match="smaller"):
        Mapping.map(descriptors, adoption=0, **shared.sizes)
    os.close(short)


@pytest.mark.parametrize("which", [1, 2])
def test_a_foreign_format_is_refused(shared: SharedMemory, which: int) -> None:
    os.pwrite(shared.descriptors[which], b"\xff" * 16, 0)
    with pytest.raises(ValueError, match="format"):
        shared.mapping()


def test_a_directory_with_more_entries_than_room_is_refused(shared: SharedMemory) -> None:
    os.pwrite(shared.descriptors[1], (1 << 20).to_bytes(8, "little"), 24)
    with pytest.raises(ValueError, match="room"):
        shared.mapping()


def test_touches(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    mapping.touch([4, 5, 5, 6], {5})
    assert list(shared.page.ring[:5]) == [4, 5 | MISSED, 5 | MISSED, 6, 0]
    assert (shared.page.num_touches, shared.page.num_misses) == (4, 2)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=12), st.booleans()), max_size=30
    )
)
@settings(max_examples=100)
def test_touches_are_a_ring(batches: list[tuple[list[int], bool]]) -> None:
    """Against one store per entry, in a ring small enough to go round."""
    from expertstore.shared.session_page import PAGE_BYTES, SessionPage

    capacity = 16
    page = SessionPage.format(memoryview(bytearray(PAGE_BYTES + 4 * capacity)), 1)
    expected, misses, position = [0] * capacity, 0, 0
    for entries, all_missed in batches:
        missed = set(entries) if all_missed else NOTHING
        page.touch(entries, missed)
        for entry in entries:
            expected[position % capacity] = entry | MISSED if entry in missed else entry
            misses += entry in missed
            position += 1
        assert list(page.ring) == expected
        assert (page.num_touches, page.num_misses) == (position, misses)


class Step:
    """What may happen to a mapping, each as a method; the daemon's side included."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.mapping = shared.mapping()
        self.held: list[int] = []
        self.fetching = False

    def hold(self, entry: int) -> None:
        if self.held or self.fetching:
            with pytest.raises(PreconditionError):
                self.mapping.try_hold([entry])
        elif ABSENT not in self.mapping.try_hold([entry]):
            self.held = [entry]

    def release(self, entry: int) -> None:
        if self.held:
            self.mapping.release()
            self.held = []

    def fetch(self, entry: int) -> None:
        if self.held:
            with pytest.raises(PreconditionError):
                self.mapping.begin_fetch()
            return
        number = self.mapping.begin_fetch()
        assert self.shared.page.released_fetch == number - 1
        self.fetching = True

    def granted(self, entry: int) -> None:
        if self.fetching:
            self.shared.publish(entry, entry)
            assert ABSENT not in self.mapping.try_hold([entry], HoldState.FETCHING)
            self.held, self.fetching = [entry], False

    def abandon(self, entry: int) -> None:
        self.mapping.abandon_fetch()
        self.fetching = False

    def nudge(self, entry: int) -> None:
        self.mapping.publish()

    def evict(self, entry: int) -> None:
        self.shared.evict(entry)

    def publish(self, entry: int) -> None:
        self.shared.publish(entry, entry)


STEPS = [name for name in vars(Step) if not name.startswith("_")]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_order_keeps_the_epoch_rule(steps: list[tuple[str, int]]) -> None:
    with shared_memory() as shared:
        step = Step(shared)
        epoch_at_hold = shared.page.epoch
        for name, entry in steps:
            act: Callable[[int], None] = getattr(step, name)
            held_before = bool(step.held)
            act(entry)
            if step.held and not held_before:
                epoch_at_hold = shared.page.epoch
            if step.held:
                # The rule: nothing that was withdrawn since the hold is given free.
                assert shared.page.epoch == epoch_at_hold
            elif held_before or name in {"nudge", "fetch"}:
                # Progress: what is no longer held holds nobody up.
                assert shared.page.epoch == shared.directory.epoch
            if step.held or step.fetching:
                continue
            assert step.mapping.state is HoldState.IDLE


class PausingDirectory:
    """Stops a publishing thread between its look at the state and its load of the epoch."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.looked, self.go_on = threading.Event(), threading.Event()

    @property
    def epoch(self) -> int:
        self.looked.set()
        self.go_on.wait(0.1)
        return self.shared.directory.epoch


def test_a_hold_cannot_slip_into_a_nudge(shared: SharedMemory) -> None:
    """Else the nudge would publish an epoch that began after the hold."""
    mapping = shared.mapping()
    shared.publish(0, 1)
    directory = PausingDirectory(shared)
    mapping._directory = directory  # type: ignore[assignment]
    nudge = threading.Thread(target=mapping.publish)
    nudge.start()
    directory.looked.wait()
    assert ABSENT not in mapping.try_hold([0])  # must wait for the nudge to end
    epoch = shared.evict(0)
    directory.go_on.set()
    nudge.join()
    assert shared.page.epoch < epoch


def test_nudges_race_with_holds(shared: SharedMemory) -> None:
    """A nudge thread beside a worker beside an evicting daemon: reads are never overrun."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    mapping = shared.mapping()
    stop = threading.Event()

    def nudge() -> None:
        while not stop.is_set():
            mapping.publish()

    shared.publish(0, 1)
    thread = threading.Thread(target=nudge)
    thread.start()
    try:
        for generation in range(2, 4000):
            assert ABSENT not in mapping.try_hold([0])
            epoch = shared.evict(0)
            for _ in range(3):
                assert shared.page.epoch < epoch
            mapping.release()
            assert shared.page.epoch == epoch
            shared.publish(0, 1, generation)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()

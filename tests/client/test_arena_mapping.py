"""One mapping of the arena for several sessions in turn, as long as it is the same arena."""

import os
import struct
from pathlib import Path

import pytest

from expertd_client.arena_mapping import ArenaMapping
from expertd_client.mapping import HoldState, Mapping
from expertstore.errors import SessionLostError
from expertstore.shared.arena_trailer import TRAILER_BYTES
from expertstore.shared.directory import ABSENT
from tests.client.shared_memory import ARENA_PAGES, PAGE, SharedMemory, shared_memory


def test_the_same_arena_is_used_again(shared: SharedMemory) -> None:
    first = shared.mapping()
    shared.trailer.adopt()
    second = Mapping.map(shared.descriptors, adoption=1, previous=first, **shared.sizes)
    address = first.arena_address
    first.close()
    assert first.arena_mapping is None
    assert second.arena_address == address
    shared.arena[:5] = b"bytes"
    assert bytes(second.arena[:5]) == b"bytes"


def entered(address: int, num_pages: int) -> set[int]:
    """Which of these pages this process's page table has."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(address // PAGE * 8)
        words = struct.unpack(f"{num_pages}Q", file.read(8 * num_pages))
    return {number for number, word in enumerate(words) if word >> 63}


def test_what_is_resident_is_entered_into_the_page_table(shared: SharedMemory) -> None:
    num_bytes = ARENA_PAGES * PAGE
    shared.arena[:num_bytes] = bytes(num_bytes)
    shared.publish(1, 5)
    shared.publish(3, 40)
    mapping = shared.mapping()
    assert not {5, 23, 40} & entered(mapping.arena_address, ARENA_PAGES)
    mapping.enter_pages([PAGE, 2 * PAGE, PAGE, 3 * PAGE]).join(10)
    assert {5, 6, 40, 41, 42} <= entered(mapping.arena_address, ARENA_PAGES)
    # The kernel enters up to 15 neighbours, too.
    assert 23 not in entered(mapping.arena_address, ARENA_PAGES), "nothing far from them"


def test_nothing_is_entered_of_what_is_let_go(shared: SharedMemory) -> None:
    arena = ArenaMapping(shared.descriptors[0], shared.sizes["arena_bytes"])
    unmapped: list[bool] = []
    arena.before_unmapping(lambda: unmapped.append(True))
    thread = arena.enter_pages((0, PAGE) for _ in range(100_000))
    del arena
    thread.join(10)
    assert not thread.is_alive()
    assert unmapped, "the thread does not keep it"


def test_another_is_not(shared: SharedMemory) -> None:
    first = shared.mapping()
    with shared_memory() as other:
        second = Mapping.map(other.descriptors, adoption=0, previous=first, **other.sizes)
        assert second.arena_mapping is not first.arena_mapping
        other.arena[:5] = b"other"
        assert bytes(second.arena[:5]) == b"other"


def test_another_extent_of_it_is_not(shared: SharedMemory) -> None:
    arena = ArenaMapping(shared.descriptors[0], shared.sizes["arena_bytes"])
    assert arena.is_of(shared.descriptors[0], shared.sizes["arena_bytes"])
    assert not arena.is_of(shared.descriptors[0], shared.sizes["arena_bytes"] - 4096)
    assert not arena.is_of(shared.descriptors[1], shared.sizes["arena_bytes"])


def test_a_foreign_trailer_is_refused(shared: SharedMemory) -> None:
    os.pwrite(shared.descriptors[0], b"\xff" * 8, shared.sizes["arena_bytes"])
    with pytest.raises(ValueError, match="not an arena"):
        ArenaMapping(shared.descriptors[0], shared.sizes["arena_bytes"])
    assert os.fstat(shared.descriptors[0]).st_size == shared.sizes["arena_bytes"] + TRAILER_BYTES


def test_a_next_daemon_that_reuses_bytes_voids_the_session(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    mapping.disconnect()
    shared.trailer.adopt()
    assert ABSENT not in mapping.try_hold([0])
    mapping.release()  # nothing was changed yet
    assert ABSENT not in mapping.try_hold([0])
    shared.trailer.begin_reuse()
    with pytest.raises(SessionLostError, match="another daemon has taken over"):
        mapping.release()
    assert mapping.state is HoldState.LOST


@pytest.mark.parametrize("holding", [False, True])
def test_a_session_that_hears_of_it_late(shared: SharedMemory, holding: bool) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    if holding:
        assert ABSENT not in mapping.try_hold([0])
    shared.trailer.retire()
    mapping.disconnect()
    assert mapping.state is (HoldState.HOLDING if holding else HoldState.LOST)
    with pytest.raises(SessionLostError):
        mapping.check_revoked()
    with pytest.raises(SessionLostError):
        mapping.release() if holding else mapping.try_hold([0])


def test_the_next_daemons_own_sessions_stay(shared: SharedMemory) -> None:
    shared.trailer.adopt()
    mapping = shared.mapping()
    shared.publish(0, 1)
    shared.trailer.begin_reuse()
    assert ABSENT not in mapping.try_hold([0])
    mapping.release()

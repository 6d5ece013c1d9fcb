"""Holding across a step: look-ups while a lease is held, and the end of what was registered."""

from pathlib import Path

import pytest

from expertd_client import (
    Client,
    NotFoundError,
    PreconditionError,
    SessionLostError,
    UnavailableError,
)
from expertd_client.mapping import Mapping
from expertd_testing.daemon import Daemon
from expertd_testing.handmade import record
from expertstore.shared.directory import ABSENT
from tests.client.observing import eventually
from tests.client.shared_memory import SharedMemory

RECORD_BYTES = 2 * 4096


def test_finds_what_is_resident_in_any_layer(store: Client) -> None:
    with store.attach("m") as session:
        session.acquire(0, [1, 2]).release()
        session.acquire(2, [5]).release()
        hits, misses = session.host_hits, session.nvme_misses
        missing = session.absent([(2, expert) for expert in range(8)])
        with session.hold() as lease:
            assert (lease.layer, lease.experts, lease.views) == (None, (), [])
            first, second = lease.find(0, [2, 1]), lease.find(2, range(8))
            assert list(first) == [2, 1]
            assert set(second) == set(range(8)) - {expert for _, expert in missing}
            for layer, found in ((0, first), (2, second)):
                for expert, offset in found.items():
                    view = session._mapping.arena[offset : offset + RECORD_BYTES]
                    assert bytes(view) == record(layer, expert)
            lease.check()
        assert session.host_hits == hits + 2 + len(second)
        assert session.nvme_misses == misses


def test_finds_more_beside_what_was_fetched(mortal: Daemon) -> None:
    with Client(mortal.socket) as store, store.attach("m") as session:
        session.acquire(0, [1]).release()
        with session.acquire(1, [3]) as lease:
            assert lease.find(0, [0, 1]).keys() == {1}
            assert lease.find(1, [3, 4]) == {3: lease.offsets[0]}


def test_nothing_is_fetched_or_found_at_the_wrong_time(store: Client) -> None:
    with store.attach("m") as session:
        session.acquire(0, [1]).release()
        with session.hold() as lease:
            for call in (lambda: session.acquire(1, [0]), session.hold):
                with pytest.raises(PreconditionError, match="release it"):
                    call()
            with pytest.raises(NotFoundError, match="no expert 8"):
                lease.find(0, [8])
        with pytest.raises(PreconditionError, match="released"):
            lease.find(0, [1])


def test_what_it_found_stays_while_others_wait(tight: Daemon) -> None:
    """Room for six records: whoever wants others waits for the holder's release."""
    with (
        Client(tight.socket) as store,
        store.attach("m") as holder,
        store.attach("m") as other,
    ):
        holder.acquire(0, range(6)).release()
        with holder.hold() as lease:
            found = lease.find(0, range(6))
            assert len(found) == 6
            other.prefetch([(1, 0)])
            for expert, offset in found.items():
                assert bytes(holder._mapping.arena[offset:][:RECORD_BYTES]) == record(0, expert)
        with other.acquire(1, range(6)) as lease:
            assert [bytes(view) for view in lease.views] == [record(1, e) for e in range(6)]


def test_who_holds_for_too_long_is_told_in_the_midst_of_it(tight: Daemon) -> None:
    with (
        Client(tight.socket) as store,
        store.attach("m") as holder,
        store.attach("m") as other,
    ):
        holder.acquire(0, range(6)).release()
        lease = holder.hold()
        lease.find(0, range(6))
        lease.check()
        other.acquire(1, range(6), timeout_seconds=20, in_arena=True).release()
        with pytest.raises(SessionLostError, match="held records for too long"):
            lease.check()
        with pytest.raises(SessionLostError):
            lease.release()


def test_an_older_session_page_shows_nothing_new_while_it_looks_on(shared: SharedMemory) -> None:
    mapping = shared.mapping()
    shared.publish(0, 1)
    shared.publish(1, 2)
    before = shared.page.epoch
    assert ABSENT not in mapping.try_hold([0])
    epoch = shared.evict(0)
    assert mapping.look_up([0, 1])[0] == 0
    mapping.publish()  # as a nudge does
    assert shared.page.epoch == before
    mapping.release()
    assert shared.page.epoch == epoch
    with pytest.raises(PreconditionError):
        mapping.look_up([1])


def _is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(int(line.split("-")[0], 16) == address for line in lines)


@pytest.mark.parametrize("end", [Mapping.leave, Mapping.close])
def test_told_before_the_arena_is_unmapped(shared: SharedMemory, end: object) -> None:
    mapping = shared.mapping()
    address = mapping.arena_address
    told: list[bool] = []
    mapping.before_unmapping(lambda: told.append(_is_mapped(address)))
    end(mapping)  # type: ignore[operator]
    assert told == [True]
    assert not _is_mapped(address)
    with pytest.raises((PreconditionError, UnavailableError)):
        mapping.before_unmapping(lambda: None)


def test_not_told_while_the_next_session_uses_the_arena(shared: SharedMemory) -> None:
    told: list[int] = []
    first = shared.mapping()
    first.before_unmapping(lambda: told.append(1))
    second = Mapping.map(shared.descriptors, adoption=1, previous=first, **shared.sizes)
    first.close()
    assert told == []
    second.close()
    assert told == [1]


def test_told_when_the_session_ends(store: Client) -> None:
    told: list[int] = []
    with store.attach("m") as session:
        session.before_unmapping(lambda: told.append(1))
        session.acquire(0, [1]).release()
        assert told == []
    eventually(lambda: told == [1])

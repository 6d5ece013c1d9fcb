"""The connection, its listener thread and its end, with a hand-made daemon."""

import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from expertd_client.attachment import Attachment
from expertd_client.mapping import HoldState
from expertstore.errors import PreconditionError, SessionLostError, UnavailableError
from expertstore.shared.directory import ABSENT
from expertstore.shared.handshake import NUDGE
from tests.client.observing import eventually, num_open_files
from tests.client.shared_memory import SharedMemory


@pytest.fixture
def attached(shared: SharedMemory) -> Iterator[tuple[Attachment, socket.socket]]:
    greeting, theirs = shared.greeting()
    with greeting, theirs:
        attachment = Attachment(greeting)
        yield attachment, theirs
        attachment.close()


def test_nudge_is_answered_while_idle(
    shared: SharedMemory, attached: tuple[Attachment, socket.socket]
) -> None:
    epoch = shared.evict(0)
    attached[1].send(NUDGE)
    eventually(lambda: shared.page.epoch == epoch)


def test_nudge_is_not_answered_while_holding(
    shared: SharedMemory, attached: tuple[Attachment, socket.socket]
) -> None:
    attachment, theirs = attached
    shared.publish(0, 1)
    before = shared.page.epoch
    assert ABSENT not in attachment.mapping.try_hold([0])
    epoch = shared.evict(1)
    theirs.send(NUDGE)
    time.sleep(0.05)
    assert shared.page.epoch == before
    attachment.mapping.release()
    assert shared.page.epoch == epoch


def test_end_of_connection_is_noticed_at_once(
    shared: SharedMemory, attached: tuple[Attachment, socket.socket]
) -> None:
    attachment, theirs = attached
    assert attachment.connected
    theirs.close()
    eventually(lambda: not attachment.connected)
    assert attachment.mapping.state is HoldState.IDLE  # nobody moves the records


def test_cut_off(shared: SharedMemory, attached: tuple[Attachment, socket.socket]) -> None:
    attachment, theirs = attached
    shared.page.revoke()
    theirs.close()
    eventually(lambda: attachment.mapping.state is HoldState.LOST)
    with pytest.raises(SessionLostError):
        attachment.mapping.try_hold([0])


def test_the_arena_of_a_daemon_that_has_gone_is_let_go(
    shared: SharedMemory,
    attached: tuple[Attachment, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expertd_client.attachment.KEEP_SECONDS", 0.1)
    attachment, theirs = attached
    arena = weakref.ref(attachment.mapping.arena_mapping)
    shared.publish(0, 1)
    assert ABSENT not in attachment.mapping.try_hold([0])
    theirs.close()
    time.sleep(0.3)
    assert arena() is not None, "a lease needs it"
    attachment.mapping.release()
    eventually(lambda: arena() is None)
    assert attachment.mapping.state is HoldState.LEFT
    with pytest.raises(UnavailableError, match="reattach"):
        attachment.mapping.try_hold([0])
    with pytest.raises(UnavailableError):
        attachment.mapping.begin_fetch()


def test_the_arena_of_a_daemon_that_is_there_is_kept(
    attached: tuple[Attachment, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd_client.attachment.KEEP_SECONDS", 0.01)
    time.sleep(0.1)
    assert attached[0].mapping.state is HoldState.IDLE
    assert attached[0].mapping.arena_mapping is not None


def test_close_twice_ends_thread_and_connection(shared: SharedMemory) -> None:
    gc.collect()
    threads, descriptors = threading.active_count(), num_open_files()
    greeting, theirs = shared.greeting()
    with greeting, theirs:
        attachment = Attachment(greeting)
        attachment.close()
        attachment.close()
        assert theirs.recv(1) == b""
        assert not attachment.connected
        del attachment
    assert threading.active_count() == threads
    assert num_open_files() == descriptors


def test_hang_up_without_close_leaves_nothing(shared: SharedMemory) -> None:
    """What a session's finalizer does."""
    gc.collect()
    descriptors = num_open_files()
    greeting, theirs = shared.greeting()
    with greeting, theirs:
        attachment = Attachment(greeting)
        gone = weakref.ref(attachment)
        attachment.hang_up()
        attachment.hang_up()
        assert theirs.recv(1) == b""
        del attachment
    eventually(lambda: (gc.collect(), gone() is None)[1])
    assert num_open_files() == descriptors


def test_foreign_memory_is_refused_and_closed(shared: SharedMemory) -> None:
    descriptors = num_open_files()
    os.pwrite(shared.descriptors[1], bytes(8), 0)
    greeting, theirs = shared.greeting()
    with theirs:
        with greeting, pytest.raises(PreconditionError, match="same version"):
            Attachment(greeting)
        assert theirs.recv(1) == b""
    assert num_open_files() == descriptors

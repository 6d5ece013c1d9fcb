"""The daemon goes, and comes back."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from expertd_client import (
    Client,
    ExpertdError,
    IncarnationError,
    NotFoundError,
    PreconditionError,
    Session,
    UnauthenticatedError,
    UnavailableError,
)
from expertd_client.aio import AsyncClient
from expertd_client.attachment import Attachment
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.supervised import supervised
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import eventually, num_arenas, num_open_files

RAM = 64 * RECORD_BYTES


@contextmanager
def attached(daemon: Daemon) -> Iterator[Session]:
    with Client(daemon.socket, timeout_seconds=10) as store, store.attach("m") as session:
        yield session


def with_credentials(attachment: Attachment, token: str, incarnation: str) -> None:
    attachment.credentials = (("expertd-token", token), ("expertd-incarnation", incarnation))


def test_killed_daemon(mortal: Daemon) -> None:
    with attached(mortal) as session:
        session.acquire(0, [0, 1]).release()
        held = session.acquire(0, [1])
        mortal.kill()
        eventually(lambda: not session.connected)
        # The running step is finished from RAM.
        assert bytes(held.views[0]) == record(0, 1)
        held.release()
        with session.acquire(0, [0]) as lease:
            assert bytes(lease.views[0]) == record(0, 0)
        with pytest.raises(UnavailableError, match=str(mortal.socket)):
            session.acquire(0, [0, 7])
        with pytest.raises(UnavailableError):
            session.prefetch([(2, 0)])
        session.acquire(0, [0]).release()


def test_daemon_that_ended_in_order(mortal: Daemon) -> None:
    with attached(mortal) as session:
        held = session.acquire(0, [0, 1])
        mortal.terminate()
        eventually(lambda: not session.connected)
        # Nobody reuses what is mapped: the running step is finished from RAM here too.
        assert bytes(held.views[1]) == record(0, 1)
        held.release()
        session.acquire(0, [0]).release()
        with pytest.raises(UnavailableError):
            session.acquire(0, [7])


def test_reattach(mortal: Daemon, pack: Path) -> None:
    with attached(mortal) as session:
        session.acquire(0, [0, 1]).release()
        session.acquire(0, [0, 1]).release()
        before, files, threads = session.incarnation, num_open_files(), threading.active_count()
        mortal.kill()
        with serving({"m": pack}, ram=2 * RAM, socket=mortal.socket) as successor:
            eventually(lambda: not session.connected)
            session.reattach(5)
            assert session.connected
            assert session.incarnation != before
            assert session.arena_bytes == 2 * RAM
            assert session.model.max_fetch_records == 128
            with session.acquire(0, [0, 5]) as lease:
                assert [bytes(view) for view in lease.views] == [record(0, 0), record(0, 5)]
            assert (session.host_hits, session.nvme_misses) == (2, 4)
            assert threading.active_count() == threads
            assert num_open_files() <= files + 5  # the new daemon's log, stdout and channel
            # Also of its own accord, from a daemon that is well.
            session.reattach(5)
            with session.acquire(0, [0]) as lease:
                assert bytes(lease.views[0]) == record(0, 0)
            with Client(successor.socket) as store:
                eventually(lambda: len(store.stats()["sessions"]) == 1)


def test_reattach_waits_for_the_daemon(mortal: Daemon, pack: Path) -> None:
    with attached(mortal) as session:
        mortal.kill()
        thread = threading.Thread(target=session.reattach, args=(20,))
        thread.start()
        time.sleep(0.2)
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()
            assert session.connected


def test_reattach_gives_up(mortal: Daemon, pack: Path) -> None:
    with attached(mortal) as session:
        session.acquire(0, [0]).release()
        mortal.kill()
        eventually(lambda: not session.connected)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=r"within 0\.3 s.*expertd serve"):
            session.reattach(0.3)
        assert 0.25 < time.monotonic() - began < HANG_SECONDS
        session.acquire(0, [0]).release()  # what is mapped stays
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            session.reattach(5)
            session.acquire(0, [7]).release()


@pytest.mark.parametrize("waits", ["in reattach", "before it"])
def test_a_worker_that_waits_lets_go_of_the_old_arena(
    waits: str, mortal: Daemon, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next daemon may need the RAM to start at all."""
    monkeypatch.setattr("expertd_client.attachment.KEEP_SECONDS", 0.2)
    with attached(mortal) as session:
        threads = threading.active_count()
        session.acquire(0, [0]).release()
        assert num_arenas() == 1
        mortal.kill()
        thread = threading.Thread(target=session.reattach, args=(20,))
        if waits == "in reattach":
            thread.start()
        eventually(lambda: num_arenas() == 0)
        if waits == "before it":
            with pytest.raises(UnavailableError, match="let go of its memory"):
                session.acquire(0, [0])
            with pytest.raises(UnavailableError):
                session.prefetch([(0, 0)])
            thread.start()
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            thread.join(10)
            assert not thread.is_alive()
            with session.acquire(0, [0]) as lease:
                assert bytes(lease.views[0]) == record(0, 0)
            assert num_arenas() == 1
            assert threading.active_count() == threads


def test_it_lets_go_in_the_queue_of_a_service_too(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket unit listens, so that reattaching waits for an answer and never fails."""
    monkeypatch.setattr("expertd_client.attachment.KEEP_SECONDS", 0.2)
    with supervised({"m": pack}, ram=RAM) as service, Client(service.socket) as store:
        session = store.attach("m")
        session.acquire(0, [0]).release()
        with service.holding_restarts():
            service.wait_ended(service.kill())
            thread = threading.Thread(target=session.reattach, args=(20,))
            thread.start()
            eventually(lambda: num_arenas() == 0)
        thread.join(10)
        assert not thread.is_alive()
        with session.acquire(0, [0]) as lease:
            assert bytes(lease.views[0]) == record(0, 0)
        assert (session.host_hits, session.nvme_misses) == (1, 1), "it was a warm restart"
        session.detach()


def test_reattach_waits_for_a_socket_that_lets_nobody_in_yet(mortal: Daemon, pack: Path) -> None:
    with attached(mortal) as session:
        mortal.kill()
        mortal.socket.chmod(0)
        uid = os.geteuid()
        if uid == 0:  # who may connect to any socket
            os.seteuid(65534)
        try:
            with pytest.raises(UnavailableError, match="may not enter"):
                session.reattach(0.3)
        finally:
            os.seteuid(uid)
            mortal.socket.chmod(0o750)
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            session.reattach(10)


async def test_the_asyncio_client_lets_go_too(
    mortal: Daemon, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd_client.attachment.KEEP_SECONDS", 0.2)
    async with AsyncClient(mortal.socket) as store, await store.attach("m") as session:
        (await session.acquire(0, [0])).release()
        mortal.kill()
        task = asyncio.create_task(session.reattach(20))
        await asyncio.to_thread(eventually, lambda: num_arenas() == 0)
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            await asyncio.wait_for(task, 10)
            with await session.acquire(0, [0]) as lease:
                assert bytes(lease.views[0]) == record(0, 0)


def test_reattach_to_another_model(mortal: Daemon, tmp_path: Path) -> None:
    other = make_pack(tmp_path / "pack", seed=1)
    with attached(mortal) as session:
        files = num_open_files()
        mortal.kill()
        with serving({"m": other}, ram=RAM, socket=mortal.socket) as successor:
            with pytest.raises(PreconditionError, match="fingerprint"):
                session.reattach(5)
            assert num_open_files() <= files + 5
            successor.kill()
        with (
            serving({"n": other}, ram=RAM, socket=mortal.socket),
            pytest.raises(NotFoundError, match="'m'"),
        ):
            session.reattach(5)


def test_reattach_with_a_lease_is_refused(roomy: Daemon) -> None:
    with attached(roomy) as session:
        with session.acquire(0, [0]), pytest.raises(PreconditionError, match="Release the lease"):
            session.reattach(1)
        session.reattach(1)


def test_attach_does_not_believe_an_old_failure(mortal: Daemon, pack: Path) -> None:
    """The channel is between two attempts when the new daemon is there."""
    with Client(mortal.socket) as store:
        store.list_models()
        mortal.kill()
        stop = threading.Event()

        def ask() -> None:
            while not stop.wait(0.002):
                with suppress(UnavailableError):
                    store.list_models()

        thread = threading.Thread(target=ask)
        thread.start()
        # Into the third of gRPC's own pauses, which would be from 2.6 to 5.2 s.
        time.sleep(2.5)
        try:
            with serving({"m": pack}, ram=RAM, socket=mortal.socket):
                began = time.monotonic()
                store.attach("m").detach()
                took = time.monotonic() - began
                began = time.monotonic()
                store.attach("m").detach()
                usual = time.monotonic() - began
                # A pause of gRPC's would come on top of what an attach takes here now.
                assert took < usual + 1.5
        finally:
            stop.set()
            thread.join()


def test_call_with_an_old_incarnation(mortal: Daemon, pack: Path) -> None:
    with attached(mortal) as session:
        mortal.kill()
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            # A moment is needed for the channel to find the new socket.
            eventually(lambda: type(failure(session)) is not UnavailableError)
            assert type(failure(session)) is IncarnationError


def test_call_with_a_wrong_token(roomy: Daemon) -> None:
    with attached(roomy) as session:
        with_credentials(session._attachment, "0" * 32, session.incarnation)
        assert type(failure(session)) is UnauthenticatedError
        with_credentials(session._attachment, "0" * 32, "")
        assert type(failure(session)) is UnauthenticatedError


def failure(session: Session) -> ExpertdError:
    with pytest.raises(ExpertdError) as raised:
        session.acquire(1, [1])
    return raised.value


def test_killed_while_a_fetch_waits(pack: Path) -> None:
    """Blocked behind another session's lease when the daemon goes."""
    with (
        serving({"m": pack}, ram=6 * RECORD_BYTES) as daemon,
        attached(daemon) as holder,
        attached(daemon) as waiter,
        holder.acquire(0, [0, 1, 2]),
    ):
        failures = []
        thread = threading.Thread(target=lambda: failures.append(failure_of_wave(waiter)))
        thread.start()
        time.sleep(0.2)
        daemon.kill()
        thread.join(HANG_SECONDS)
        assert failures == [UnavailableError]


def failure_of_wave(session: Session) -> type[ExpertdError]:
    with pytest.raises(ExpertdError) as raised:
        session.acquire(1, range(6), in_arena=True)
    return type(raised.value)

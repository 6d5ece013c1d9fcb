"""The daemon as a service: readiness, socket activation, watchdog."""

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.attach import adopt_listener, listen
from expertd.errors import ConfigError
from expertd.handshake import ATTACH_SOCKET
from expertd_client import Client
from tests.expert_store.serving.watching import assert_serves, eventually
from tests.supervised import supervised


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="expertd-") as path:
        yield Path(path)


def test_ready_when_it_serves(pack: Path) -> None:
    with supervised({"m": pack}) as service:
        run = service.wait_ready()
        assert_serves(service.socket)
        assert run.statuses == [
            "preparing the arena",
            "opening packs, and verifying records that were left",
            "serving",
        ]
        service.stop()
        assert run.status == "stopping"
        assert run.stopping
        assert run.exit_status == 0


def test_not_ready_when_it_cannot_serve(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"is not a pack: it has no pack\.json"),
        supervised({"m": tmp_path}, restarts=False),
    ):
        pass


def test_its_own_attach_socket_under_a_manager(pack: Path) -> None:
    with supervised({"m": pack}, activated=False) as service:
        assert_serves(service.socket)
        service.kill()
        service.wait_ready(starts=2)
        assert_serves(service.socket)
        service.stop()
        assert not (service.socket / ATTACH_SOCKET).exists()


def test_who_comes_while_nobody_serves_is_served_by_the_next(pack: Path) -> None:
    with supervised({"m": pack}) as service, Client(service.socket) as store:
        inode = (service.socket / ATTACH_SOCKET).stat().st_ino
        attached = []
        with service.holding_restarts():
            run = service.kill()
            service.wait_ended(run)
            thread = threading.Thread(target=lambda: attached.append(store.attach("m")))
            thread.start()
        service.wait_ready(starts=2)
        thread.join(10)
        (session,) = attached
        session.acquire(0, [1]).release()
        session.detach()
        service.restart()
        service.wait_ready(starts=3)
        assert_serves(service.socket)
        assert (service.socket / ATTACH_SOCKET).stat().st_ino == inode


def test_the_watchdog_replaces_a_daemon_that_stands_still(pack: Path) -> None:
    with supervised({"m": pack}, watchdog_seconds=1.0) as service:
        run = service.wait_ready()
        eventually(lambda: run.num_alive >= 3)
        assert run.exit_status is None
        service.kill(signal.SIGSTOP)
        service.wait_ready(starts=2)
        assert (run.exit_status, run.timed_out) == (-signal.SIGABRT, True)
        assert_serves(service.socket)


def test_a_listener_of_another_kind_is_refused(directory: Path) -> None:
    path = directory / "a"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(path))
        stream.listen()
        with pytest.raises(ConfigError, match="ListenSequentialPacket"):
            adopt_listener(stream.detach(), path)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf,
        pytest.raises(ConfigError, match="no listening"),
    ):
        adopt_listener(deaf.detach(), path)
    with (
        (directory / "file").open("w+") as file,
        pytest.raises(ConfigError, match="no listening"),
    ):
        adopt_listener(os.dup(file.fileno()), path)


def test_a_listener_elsewhere_is_refused(directory: Path) -> None:
    listener = listen(directory / "a", 0o660)
    with pytest.raises(ConfigError, match=r"listens at .*/a, but workers look for .*/b"):
        adopt_listener(listener.detach(), directory / "b")

"""The daemon as a service: readiness, socket activation, watchdog."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.serving.attach import adopt_listener, listen
from expertd_client import Client
from expertd_testing.standin_systemd import StandInSystemd
from expertd_testing.supervised import supervised
from expertd_testing.watching import assert_serves, eventually
from expertstore.errors import ConfigError
from expertstore.shared.handshake import ATTACH_SOCKET


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


# As if the host had no more free memory than a file says.
SHORT = """
import sys
from pathlib import Path
from expertd import daemon
from expertd.memory import arena
from expertd.cli import main
free = Path(sys.argv.pop(1))
arena.memory_available = lambda: int(free.read_text())
daemon._MEMORY_SECONDS = float(sys.argv.pop(1))
main()
"""


def test_memory_that_comes_free_is_waited_for(directory: Path) -> None:
    free = directory / "free"
    free.write_text("4096")
    command = [sys.executable, "-c", SHORT, str(free), "60", "serve"]
    command += ["--socket", str(directory / "s"), "--ram", "1MiB"]
    with StandInSystemd(command) as service:
        eventually(lambda: "waiting for memory" in [run.status for run in service.runs])
        assert service.output.count("waiting for memory") == 1
        free.write_text(str(1 << 20))
        assert service.wait_ready() is service.runs[0]


@pytest.mark.parametrize("managed", [True, False])
def test_memory_that_does_not_is_a_temporary_failure(managed: bool, directory: Path) -> None:
    free = directory / "free"
    free.write_text("4096")
    # Nobody waits at a terminal.
    command = [sys.executable, "-c", SHORT, str(free), "0.5" if managed else "60", "serve"]
    command += ["--socket", str(directory / "s"), "--ram", "1MiB"]
    if managed:
        with StandInSystemd(command, restarts=False) as service:
            eventually(lambda: bool(service.runs))
            assert service.wait_ended(service.runs[0]) == os.EX_TEMPFAIL
            told = service.output.splitlines()[-1]
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == os.EX_TEMPFAIL
        (told,) = done.stderr.splitlines()
    assert told.startswith("expertd: the RAM budget is 1.0 MiB, but of ")
    assert "only 4.0 KiB are free" in told


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

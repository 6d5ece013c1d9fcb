"""The stand-in does for a service what systemd would."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_testing.standin_systemd import StandInSystemd
from expertd_testing.watching import eventually, num_files

SERVICE = """
import asyncio, os, signal, sys
from expertd.manager.systemd import Manager

async def main():
    stop = asyncio.Event()
    # Before it is ready, since whoever waits for that may stop it at once.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    manager = Manager.take()
    passed = sorted(name for name, _ in manager.take_rest())
    fds = [os.memfd_create(str(i)) for i in range(3)]
    for i, fd in enumerate(fds):
        await manager.store(f"fd-{i % 2}", fd)
        await manager.store("again", fd)
    await manager.barrier()
    await manager.ready()
    await manager.status(f"pid {os.getpid()} watchdog {manager.watchdog_seconds} "
                         f"room {manager.max_stored} passed {passed}")
    if sys.argv[1] == "remove":
        await manager.remove("fd-0")
        await manager.barrier()
        print("removed", flush=True)
    while not stop.is_set():
        if sys.argv[1] != "deaf":
            await manager.alive()
        await asyncio.sleep(0.02)
    await manager.stopping()
    sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)

asyncio.run(main())
"""


def service(*arguments: str, **options: Any) -> StandInSystemd:
    return StandInSystemd([sys.executable, "-c", SERVICE, *arguments], **options)


@pytest.fixture
def attach_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="expertd-") as directory:
        yield Path(directory) / "run" / "attach.sock"


def test_what_the_service_is_given(attach_path: Path) -> None:
    files = num_files(os.getpid())
    with service("", attach_path=attach_path, watchdog_seconds=5, max_stored=8) as systemd:
        run = systemd.wait_ready()
        said = f"pid {run.pid} watchdog 5.0 room 8 passed ['attach']"
        eventually(lambda: run.status == said)
        assert systemd.stored_names == ["fd-0", "fd-1", "fd-0"]
        copies = systemd.stored("fd-0")
        assert [str(Path(f"/proc/self/fd/{fd}").readlink()).split()[0] for fd in copies] == [
            "/memfd:0", "/memfd:2",
        ]  # fmt: skip
        for fd in copies:
            os.close(fd)
    systemd.close()
    assert num_files(os.getpid()) == files


def test_a_failed_service_gets_its_descriptors_again(attach_path: Path) -> None:
    with service("", attach_path=attach_path) as systemd:
        first = systemd.wait_ready()
        systemd.kill()
        second = systemd.wait_ready(starts=2)
        assert first.exit_status == -signal.SIGKILL
        assert first.pid != second.pid
        assert len(systemd.stored_names) == 6  # other files, though of the same names
        # The socket listens while nobody serves, and whoever connects is kept.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(attach_path))


def test_a_restart_keeps_the_store_and_a_stop_drops_it() -> None:
    with service("") as systemd:
        systemd.wait_ready()
        ended = systemd.restart()
        assert (ended.exit_status, ended.stopping) == (0, True)
        systemd.wait_ready(starts=2)
        assert len(systemd.stored_names) == 6
        systemd.stop()
        assert systemd.stored_names == []
        assert len(systemd.runs) == 2


def test_a_service_that_ends_by_itself_is_not_restarted() -> None:
    with service("") as systemd:
        run = systemd.wait_ready()
        systemd.kill(signal.SIGTERM)
        assert systemd.wait_ended(run) == 0
        with pytest.raises(RuntimeError, match="did not become ready"):
            systemd.wait_ready(starts=2, seconds=0.5)


def test_one_that_fails_in_order_is() -> None:
    with service("", "3") as systemd:
        run = systemd.wait_ready()
        systemd.kill(signal.SIGTERM)
        assert systemd.wait_ended(run) == 3
        systemd.wait_ready(starts=2)


@pytest.mark.parametrize("how", ["stopped", "deaf"])
def test_the_watchdog_ends_what_does_not_feed_it(how: str) -> None:
    with service("deaf" if how == "deaf" else "", watchdog_seconds=0.3) as systemd:
        run = systemd.wait_ready()
        if how == "stopped":
            eventually(lambda: run.num_alive > 2)
            systemd.kill(signal.SIGSTOP)
        assert systemd.wait_ended(run, 10) == -signal.SIGABRT
        assert run.timed_out


def test_removed_and_too_many() -> None:
    with service("remove", max_stored=2, says_max=False) as systemd:
        systemd.wait_ready()
        eventually(lambda: "removed" in systemd.output)
        assert systemd.stored_names == ["fd-1"]


def test_strangers_are_not_heard(tmp_path: Path) -> None:
    with service("") as systemd:
        run = systemd.wait_ready()
        eventually(lambda: run.status.startswith("pid"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            for message in (b"STATUS=mine\nFDSTOREREMOVE=1\nFDNAME=fd-0", b"\xff", b""):
                stranger.sendto(message, str(systemd._notify_path))
        alive = run.num_alive
        eventually(lambda: run.num_alive > alive + 1)
        assert run.status.startswith("pid")
        assert len(systemd.stored_names) == 3

"""What the service manager gives and is told, over a real notify socket."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.manager import systemd
from expertd.manager.systemd import Manager


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[socket.socket]:
    """The manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(5)
        yield receiver


@pytest.fixture
def manager(notify: socket.socket) -> Iterator[Manager]:
    manager = Manager(address=notify.getsockname())
    yield manager
    manager.close()


def received(notify: socket.socket) -> tuple[str, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(notify, 4096, 8)
    return data.decode(), descriptors


def test_without_a_manager_nothing_happens() -> None:
    manager = Manager.take({})

    async def everything() -> None:
        await manager.ready()
        await manager.store("x", 0)
        await manager.barrier()
        await manager.stopping()

    asyncio.run(everything())
    assert not manager.is_there
    assert manager.watchdog_seconds is None
    manager.close()
    manager.close()


def test_what_is_told(notify: socket.socket, manager: Manager) -> None:
    async def everything() -> None:
        await manager.ready()
        await manager.status("two\nlines")
        await manager.alive()
        await manager.remove("directory-1")
        await manager.stopping()

    asyncio.run(everything())
    assert [received(notify)[0] for _ in range(5)] == [
        "READY=1\nSTATUS=serving",
        "STATUS=two lines",
        "WATCHDOG=1",
        "FDSTOREREMOVE=1\nFDNAME=directory-1",
        "STOPPING=1\nSTATUS=stopping",
    ]


def test_a_descriptor_is_stored(notify: socket.socket, manager: Manager) -> None:
    fd = os.memfd_create("test")
    os.write(fd, b"content")
    asyncio.run(manager.store("arena", fd))
    message, (copy,) = received(notify)
    assert message == "FDSTORE=1\nFDNAME=arena\nFDPOLL=0"
    assert os.pread(copy, 10, 0) == b"content"
    os.close(fd)
    os.close(copy)


def test_a_barrier_waits_for_the_manager(notify: socket.socket, manager: Manager) -> None:
    async def wait() -> None:
        barrier = asyncio.create_task(manager.barrier())
        message, (fd,) = await asyncio.to_thread(received, notify)
        assert message == "BARRIER=1"
        await asyncio.sleep(0.05)
        assert not barrier.done()
        os.close(fd)
        async with asyncio.timeout(5):
            await barrier

    asyncio.run(wait())


def test_a_manager_that_hangs_holds_nobody_up(
    notify: socket.socket, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "_DELIVERY_SECONDS", 0.1)

    async def wait() -> None:
        clock = asyncio.get_running_loop().time
        async with asyncio.timeout(10):
            await manager.barrier()  # nobody closes it
            took = 0.0
            while took < 0.05:  # nobody reads either: the queue fills, and one is given up
                began = clock()
                await manager.alive()
                took = clock() - began

    asyncio.run(wait())


def test_a_manager_that_is_gone(tmp_path: Path) -> None:
    manager = Manager(address=str(tmp_path / "nobody"))
    asyncio.run(manager.ready())
    manager.close()


def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0expertd-test-{os.getpid()}")
        receiver.settimeout(5)
        manager = Manager(address=f"@expertd-test-{os.getpid()}")
        asyncio.run(manager.alive())
        assert received(receiver)[0] == "WATCHDOG=1"
        manager.close()


def test_an_address_of_another_kind_is_ignored() -> None:
    manager = Manager(address="vsock:2:1234")
    assert not manager.is_there
    asyncio.run(manager.ready())


@pytest.mark.parametrize(
    ("pid", "interval", "seconds"),
    [
        ("", "3000000", 3.0),
        pytest.param(str(os.getpid()), "500000", 0.5, id="ours"),
        ("1", "3000000", None),
        ("", "0", None),
        ("", "soon", None),
    ],
)
def test_the_watchdog(pid: str, interval: str, seconds: float | None) -> None:
    environment = {"WATCHDOG_PID": pid, "WATCHDOG_USEC": interval}
    assert Manager.take(environment).watchdog_seconds == seconds
    assert environment == {}


@pytest.mark.parametrize(("said", "most"), [("8", 8), ("", None), ("many", None)])
def test_room_of_the_store(said: str, most: int | None) -> None:
    assert Manager.take({"FDSTORE": said}).max_stored == most


def test_descriptors_for_another_process_are_not_taken() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "5", "LISTEN_FDNAMES": "a:b"}
    manager = Manager.take(environment)
    assert manager.take_rest() == []
    assert environment == {}


PASSED = """
import fcntl, os, sys
from expertd.manager.systemd import Manager

os.environ["LISTEN_PID"] = str(os.getpid())
manager = Manager.take()
assert not [name for name in os.environ if name.startswith("LISTEN")]
arena, = manager.take_descriptors("arena")
assert manager.take_descriptors("arena") == []
rest = manager.take_rest()
for fd in (arena, *(fd for _, fd in rest)):
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
print(arena, rest)
"""


def test_descriptors_are_taken_by_name() -> None:
    fds = [os.memfd_create(name) for name in "abc"]
    script = "import os, sys\n"
    script += f"fds = [os.dup(os.dup(fd)) for fd in {fds}]\n"
    script += "for number, fd in enumerate(fds, 3): os.dup2(fd, number)\n"
    # The fourth was announced and is not there.
    script += "os.closerange(6, 20)\n" + PASSED
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LISTEN_FDS": "4", "LISTEN_FDNAMES": "arena:directory-0"},
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    for fd in fds:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("3 [Passed(name='directory-0', fd=4), Passed(name='', fd=5)]\n")

"""A daemon of the worker's own: there when needed, gone whichever way the worker ends."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from expertd_client import Client
from expertd_inference.process import embedded
from expertd_inference.process.embedded import EmbeddedDaemon
from expertstore.errors import PackError, UnavailableError
from expertstore.pack.manifest import read_manifest
from expertstore.shared import host_memory

Make = Callable[..., Any]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_serves_and_stops(packed: Make) -> None:
    with EmbeddedDaemon(packed("mixtral")) as daemon:
        pid, directory = daemon.pid, daemon.socket.parent
        with Client(daemon.socket) as client:
            assert [model.name for model in client.list_models()] == [daemon.name] == ["mixtral"]
        # Nobody else's business.
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not is_alive(pid)
    assert not directory.exists()
    daemon.close()


def test_does_not_speak_for_a_worker_that_is_a_service(
    packed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with EmbeddedDaemon(packed("mixtral")):
            pass
        with pytest.raises(BlockingIOError):
            notify.recv(100)


PARENT = """
import sys, time
from expertd_inference.process.embedded import EmbeddedDaemon
daemon = EmbeddedDaemon(sys.argv[1])
print(daemon.pid, daemon.socket.parent, flush=True)
time.sleep(600)
"""


def test_dies_with_a_parent_that_was_killed(packed: Make) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, packed("mixtral")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid, directory = parent.stdout.readline().split()
    assert is_alive(int(pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not is_alive(int(pid))), "it outlived its parent"
    assert wait_until(lambda: not Path(directory).exists())


def test_outlives_the_thread_that_started_it(packed: Make) -> None:
    daemons: list[EmbeddedDaemon] = []
    thread = threading.Thread(target=lambda: daemons.append(EmbeddedDaemon(packed("mixtral"))))
    thread.start()
    thread.join()
    with daemons[0] as daemon:
        time.sleep(0.3)
        assert is_alive(daemon.pid)
        with Client(daemon.socket) as client:
            client.list_models()


def test_ctrl_c_is_not_for_the_daemon(packed: Make) -> None:
    with EmbeddedDaemon(packed("mixtral")) as daemon:
        assert os.getpgid(daemon.pid) != os.getpgid(0)


def test_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is not a pack"):
        EmbeddedDaemon(tmp_path)


@pytest.mark.parametrize(
    ("ram", "message"), [("1MiB", "too small"), ("much", "is not a size"), (1, "is 1 bytes")]
)
def test_says_why_it_did_not_start(ram: str | int, message: str, packed: Make) -> None:
    with pytest.raises(UnavailableError, match=f"did not start: .*{message}") as caught:
        EmbeddedDaemon(packed("mixtral"), ram=ram)
    assert "\n" not in str(caught.value)


def test_gives_up_on_a_daemon_that_does_not_answer(
    packed: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS", 0.5)
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(hangs))
    with pytest.raises(UnavailableError, match="did not start: it said nothing"):
        EmbeddedDaemon(packed("mixtral"))


def test_a_long_directory_for_temporary_files(
    packed: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with EmbeddedDaemon(packed("mixtral")) as daemon, Client(daemon.socket) as client:
        assert daemon.socket.parent.parent == Path("/tmp")
        client.list_models()
    monkeypatch.setattr(
        tempfile, "mkdtemp", mock.Mock(side_effect=PermissionError(errno.EACCES, "no", "/tmp"))
    )
    with pytest.raises(UnavailableError, match=r"no room.*/var/tmp.*set TMPDIR to a directory"):
        EmbeddedDaemon(packed("mixtral"))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOENT, "run a daemon by `expertd serve`"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
    ],
)
def test_a_child_that_cannot_be_started(
    number: int, advice: str, packed: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if number == errno.ENOENT:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    else:
        failing = mock.Mock(side_effect=OSError(number, os.strerror(number)))
        monkeypatch.setattr(subprocess, "Popen", failing)
    with pytest.raises(UnavailableError, match=f"cannot be started by .*{advice}"):
        EmbeddedDaemon(packed("mixtral"))
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_default_ram(packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(packed("mixtral")).manifest

    def default(available_bytes: int) -> int:
        monkeypatch.setattr(host_memory, "memory_available", lambda: available_bytes)
        return host_memory.default_ram_bytes(manifest)

    assert default(100 * manifest.expert_bytes) == manifest.expert_bytes
    assert default(manifest.expert_bytes) == manifest.expert_bytes // 2
    assert default(4096) == manifest.working_set_bytes


@pytest.mark.parametrize("name", ["a=b", "with space", "ünï"])
def test_odd_names(name: str, packed: Make, tmp_path: Path) -> None:
    copy = shutil.copytree(packed("mixtral"), tmp_path / name)
    with EmbeddedDaemon(copy) as daemon, Client(daemon.socket) as client:
        assert client.list_models()[0].name == daemon.name

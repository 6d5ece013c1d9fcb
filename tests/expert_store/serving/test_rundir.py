"""The daemon's directory: one owner at a time, and a dead owner's is taken over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.serving.rundir import LOCK_NAME, RunDirectory
from expertstore.errors import ConfigError

_OWN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from expertd.serving.rundir import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.attach_socket.touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_directory_in_use_names_its_owner(tmp_path: Path) -> None:
    owner = RunDirectory(tmp_path / "a" / "run")
    owner.attach_socket.touch()
    with pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) serves at .*run.*--socket"):
        RunDirectory(tmp_path / "a" / "run")
    assert owner.attach_socket.exists(), "the second took the first one's socket away"
    owner.close()
    RunDirectory(tmp_path / "a" / "run").close()


def test_what_a_killed_daemon_left_is_taken_over(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", _OWN_AND_DIE, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "attach.sock").exists()
    directory = RunDirectory(tmp_path)
    assert not (tmp_path / "attach.sock").exists()
    assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    directory.close()


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    running = "echo running; exec sleep 60"
    child = subprocess.Popen(["/bin/sh", "-c", running], stdout=subprocess.PIPE, close_fds=False)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"running\n"
        directory.close()
        RunDirectory(tmp_path).close()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_closing_twice_leaves_the_next_owner_alone(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.rpc_socket.touch()
    first.close()
    assert not first.rpc_socket.exists()
    second = RunDirectory(tmp_path)
    second.rpc_socket.touch()
    first.close()
    assert second.rpc_socket.exists()
    second.close()


def test_names_that_no_socket_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    with pytest.raises(ConfigError, match=r"too long a name .* shorter --socket"):
        RunDirectory(path)
    assert not path.exists()


def test_the_longest_possible_name(tmp_path: Path) -> None:
    room = 107 - len("/attach.sock") - len(os.fsencode(tmp_path)) - 1
    if room < 1:
        pytest.skip("the temporary directory's own name is too long")
    RunDirectory(tmp_path / ("x" * room)).close()
    with pytest.raises(ConfigError, match="too long"):
        RunDirectory(tmp_path / ("x" * (room + 1)))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_paths_that_are_no_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.* cannot be used"):
        RunDirectory(tmp_path / name)


def test_a_directory_where_the_socket_belongs(tmp_path: Path) -> None:
    (tmp_path / "rpc.sock").mkdir()
    descriptors = _num_descriptors()
    with pytest.raises(ConfigError, match=r"cannot be used"):
        RunDirectory(tmp_path)
    assert _num_descriptors() == descriptors


def _num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))

"""Where daemon and clients meet if nobody says where."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.cli.serve import load_config
from expertd.serving.rundir import RunDirectory
from expertd_client import Client
from expertd_client.address import parse_address
from expertstore import socket_directory
from expertstore.command_line import serve_command
from expertstore.errors import ConfigError
from expertstore.socket_directory import (
    HOST_DIRECTORY,
    find_daemon,
    how_to_start,
    may_serve,
    own_directory,
    socket_directories,
    where_to_serve,
)

ALICE = 1234


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Alice's runtime directory; this process seems to be hers, on a host with a place for all."""
    monkeypatch.setattr(socket_directory, "HOST_DIRECTORY", tmp_path / "host")
    monkeypatch.setattr(socket_directory.os, "geteuid", lambda: ALICE)
    monkeypatch.setattr(socket_directory, "_is_usable", lambda runtime, _: runtime.is_dir())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "alice"))
    for name in ("alice/expertd", "host"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "alice"


@contextmanager
def answering(directory: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "rpc.sock"))
        listener.listen(0)
        (directory / "attach.sock").touch()
        yield


def test_whose_directory_it_is(tmp_path: Path) -> None:
    owner = tmp_path.stat().st_uid
    for runtime, uid, own in (
        (tmp_path, owner or ALICE, owner != 0),
        (tmp_path, 0, False),
        (tmp_path, owner + ALICE, False),  # left over from another login
        (tmp_path / "absent", owner, False),
        ("relative", owner, False),
        ("", owner, False),
    ):
        found = socket_directories({"XDG_RUNTIME_DIR": str(runtime)}, uid)
        assert found == [Path(runtime, "expertd")] * own + [HOST_DIRECTORY], (runtime, uid)
    assert socket_directories({}, ALICE) == [HOST_DIRECTORY]


def test_a_daemon_is_found_where_one_answers(runtime: Path, tmp_path: Path) -> None:
    own, host = runtime / "expertd", tmp_path / "host"
    assert find_daemon() == own, "where none is, it is where one would be started"
    with answering(host):
        assert find_daemon() == host
        with answering(own):
            assert find_daemon() == own
            assert find_daemon() == own, "nor does a full backlog hide it"
        assert find_daemon() == host, "what a dead daemon left in the user's own is nobody"


def test_a_service_that_is_not_running_is_waited_for(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "host/attach.sock").touch()
    assert find_daemon() == tmp_path / "host"


def test_all_take_the_same(runtime: Path) -> None:
    own = runtime / "expertd"
    assert load_config(None, ram_bytes=4096).socket == own
    assert str(parse_address(None, None)) == str(own)
    with Client() as store, pytest.raises(Exception, match="start one with") as raised:
        store.list_models()
    assert "`expertd serve --ram SIZE --model NAME=PACK`" in str(raised.value)


def test_who_may_not_make_it_is_told_of_one_that_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="Permission denied") as raised:
        RunDirectory(HOST_DIRECTORY)
    assert f"give `--socket {tmp_path}/.expertd` here and to every other command" in str(
        raised.value
    )
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(ConfigError, match="--socket /tmp/expertd-"):
        RunDirectory(HOST_DIRECTORY)


def test_what_is_offered_to_be_typed_works_for_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = [True]
    monkeypatch.setattr(socket_directory.os, "access", lambda *_: allowed[0])
    monkeypatch.setattr(socket_directory, "socket_directories", lambda: [tmp_path / "run/expertd"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert where_to_serve() == ()
    assert "`expertd serve --ram SIZE" in how_to_start(tmp_path / "run/expertd")
    allowed[0] = False
    own = own_directory()
    assert where_to_serve() == ("--socket", own)
    assert f"`expertd serve --socket {own} --ram" in how_to_start(tmp_path / "run/expertd")
    assert serve_command("m", Path("p"), 1, *where_to_serve()).startswith(
        f"expertd serve --socket {own} --ram 1MiB"
    )


def test_nobody_may_serve_where_no_socket_fits(tmp_path: Path) -> None:
    assert may_serve(tmp_path / "a/b")
    assert not may_serve(tmp_path / ("a" * 108))

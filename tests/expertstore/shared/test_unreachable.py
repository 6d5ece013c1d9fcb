"""Why nobody answers in a directory: one sentence for each way it may lie, whoever asks."""

import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_client.aio import AsyncClient
from expertstore.errors import (
    DeadlineError,
    ExpertdError,
    InvalidInputError,
    PermissionDeniedError,
    PreconditionError,
    UnavailableError,
)
from expertstore.shared import unreachable
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import ATTACH_SOCKET, RPC_SOCKET, Role

NOBODY = 65534
KINDS = {ATTACH_SOCKET: socket.SOCK_SEQPACKET, RPC_SOCKET: socket.SOCK_STREAM}


def left_behind(directory: Path, mode: int = 0o660) -> None:
    """The sockets of a daemon that was killed."""
    for name, kind in KINDS.items():
        with socket.socket(socket.AF_UNIX, kind) as left:
            left.bind(str(directory / name))
        (directory / name).chmod(mode)


def no_directory(path: Path) -> Path:
    return path / "none"


def empty(path: Path) -> Path:
    return path


def stale(path: Path) -> Path:
    left_behind(path)
    return path


def dangling(path: Path) -> Path:
    (path / "link").symlink_to("none")
    return path / "link"


def circle(path: Path) -> Path:
    (path / "a").symlink_to("b")
    (path / "b").symlink_to("a")
    return path / "a"


def a_file(path: Path) -> Path:
    (path / "file").touch()
    return path / "file"


def below_a_file(path: Path) -> Path:
    return a_file(path) / "s" / "t"


def files(path: Path) -> Path:
    for name in KINDS:
        (path / name).touch()
    return path


def too_long(path: Path) -> Path:
    return path / ("x" * 100)


def zero_byte(path: Path) -> Path:
    return path / "a\0b"


START = (
    r"start one with `expertd serve --socket {} --ram SIZE --model NAME=PACK`, or give the "
    r"--socket of one that runs\."
)
WAYS: list[tuple[Callable[[Path], Path], type[ExpertdError], str]] = [
    (
        no_directory,
        UnavailableError,
        rf"No expertd answers at {{}} \(there is no such directory\); {START}",
    ),
    (empty, UnavailableError, rf"No expertd answers at {{}} \(no socket in it\); {START}"),
    (
        stale,
        UnavailableError,
        r"No expertd answers at {} \(connection refused: the daemon that made its sockets has "
        rf"ended\); {START}",
    ),
    (dangling, UnavailableError, r"No expertd answers at {} \(there is no such directory\); .*"),
    (circle, InvalidInputError, r"The links of {} lead round in a circle; give the directory .*\."),
    (a_file, InvalidInputError, r"{} is not a directory; give the one that .*\."),
    (below_a_file, InvalidInputError, r"/.*/file is not a directory; give the one that .*\."),
    (files, PreconditionError, r"{}/(attach|rpc)\.sock is not expertd's; give the directory .*\."),
    (too_long, InvalidInputError, r"The path {}/attach\.sock has \d+ bytes and .* at most 107; .*"),
    (zero_byte, InvalidInputError, r"The path '.*a\\x00b' has a zero byte, which no file may\."),
]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a name short enough for sockets."""
    return tmp_path_factory.mktemp("u")


def asks(directory: Path) -> list[Callable[[], object]]:
    """All ways to ask: the attach socket, and calls as the commands and the client make them."""

    def by_command() -> object:
        with Client(directory) as client:
            return client.stats()

    def by_client() -> object:
        with Client(directory) as store:
            return store.stats()

    return [lambda: handshake(directory, Role.WORKER, "m", 5), by_command, by_client]


@pytest.mark.parametrize(
    ("way", "kind", "says"), WAYS, ids=lambda value: getattr(value, "__name__", "")
)
def test_each_way_is_told(
    place: Path, way: Callable[[Path], Path], kind: type[ExpertdError], says: str
) -> None:
    directory = way(place)
    for ask in asks(directory):
        with pytest.raises(kind) as caught:
            ask()
        pattern = says.replace("{}", re.escape(str(directory)))
        assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


async def test_the_asyncio_client_tells_it_too(place: Path) -> None:
    left_behind(place)
    async with AsyncClient(place) as store:
        with pytest.raises(UnavailableError, match="the daemon that made its sockets has ended"):
            await store.list_models()


@contextmanager
def somebody_else() -> Iterator[int]:
    """As a user who owns nothing; the tests' own user otherwise."""
    uid = os.geteuid()
    if uid != 0:
        yield uid
        return
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield NOBODY
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("mode", [0o610, 0o600])
def test_a_directory_that_may_not_be_entered(depth: int, mode: int) -> None:
    """Also one on the way to it; who may enter joins its group, if that may."""
    with tempfile.TemporaryDirectory(prefix="expertd-") as path:
        closed = Path(path)
        directory = closed / "s" if depth else closed
        directory.mkdir(exist_ok=True)
        left_behind(directory)
        closed.chmod(mode if os.geteuid() == 0 else mode & ~0o100)
        try:
            with somebody_else() as uid:
                for ask in asks(directory):
                    with pytest.raises(PermissionDeniedError) as caught:
                        ask()
                    said = str(caught.value)
                    assert said.startswith(f"User {uid} may not enter {closed}; "), said
                    assert ("join the group that it belongs to, " in said) == (mode == 0o610)
        finally:
            closed.chmod(0o700)


def test_sockets_that_may_not_be_connected_to() -> None:
    with tempfile.TemporaryDirectory(prefix="expertd-") as path:
        directory = Path(path)
        directory.chmod(0o755)
        left_behind(directory, 0o060 if os.geteuid() else 0o660)
        with somebody_else() as uid:
            for ask in asks(directory):
                with pytest.raises(PermissionDeniedError) as caught:
                    ask()
                said = str(caught.value)
                assert re.match(rf"User {uid} may not connect to {path}/\w+\.sock; join the", said)


def test_a_name_that_is_no_utf_8(place: Path) -> None:
    directory = Path(os.fsdecode(bytes(place) + b"/\xff"))
    for ask in asks(directory):
        with pytest.raises(UnavailableError, match="there is no such directory"):
            ask()
    directory.mkdir()
    left_behind(directory)
    for ask in asks(directory):
        with pytest.raises(UnavailableError, match="the daemon that made its sockets has ended"):
            ask()


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where systemd's units lie, beside a directory that is not there."""
    monkeypatch.setattr(unreachable, "UNIT_DIRECTORIES", (tmp_path / "none", tmp_path))
    (tmp_path / "expertd-other.socket").write_text("[Socket]\nListenStream=/run/other\n")
    return tmp_path


def test_a_unit_is_to_be_looked_at(place: Path, units: Path) -> None:
    """Not to be started beside: its status and its journal say why the service is not there."""
    listens = f"[Socket]\nListenSequentialPacket={place / ATTACH_SOCKET}\nBacklog=4096\n"
    (units / "expertd-gpu.socket").write_text(listens)
    advice = (
        "`systemctl status expertd-gpu.service` and `journalctl -u expertd-gpu.service` say why."
    )
    for way in (empty, stale):
        for ask in asks(way(place)):
            with pytest.raises(UnavailableError) as caught:
                ask()
            assert str(caught.value).endswith(f"; {advice}")


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "silent"])
@pytest.mark.parametrize("unit", [True, False])
def test_a_service_that_does_not_come_up(
    place: Path, units: Path, closes: bool, unit: bool
) -> None:
    """Its manager listens meanwhile: the one who attaches waits, or is hung up on at last."""
    if unit:
        (units / "expertd.socket").write_text(f"ListenSequentialPacket={place / ATTACH_SOCKET}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(place / ATTACH_SOCKET))
        listener.listen()
        if closes:
            threading.Thread(target=lambda: listener.accept()[0].close()).start()
        with pytest.raises(UnavailableError if closes else DeadlineError) as caught:
            handshake(place, Role.WORKER, "m", 5 if closes else 0.1)
    said = str(caught.value)
    happened = "was closed during attach" if closes else "gave no answer within 0.1 s"
    assert said.startswith(f"{place / ATTACH_SOCKET} {happened}")
    assert "a service manager listens on it, and expertd itself is still starting or fails" in said
    assert ("`systemctl status expertd.service`" in said) == unit

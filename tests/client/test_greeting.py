"""The handshake from the worker's side, against a hand-made daemon's answers."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from expertstore import errors
from expertstore.shared.greeting import Greeting, handshake
from expertstore.shared.handshake import (
    ATTACH_SOCKET,
    PROTOCOL_VERSION,
    Hello,
    Refusal,
    Role,
    Welcome,
)
from tests.client.observing import num_open_files

Answer = Callable[[socket.socket], None]
WELCOME = Welcome(session=1, token="t", incarnation="i")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / ATTACH_SOCKET))
        listener.listen(1)
        yield listener


def greet(
    listener: socket.socket,
    answer: Answer,
    role: Role = Role.WORKER,
    seconds: float = 5.0,
) -> Greeting:
    """A handshake with a daemon that answers the hello so; it leaks nothing if it fails."""
    hellos = []

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            hellos.append(msgspec.json.decode(peer.recv(4096), type=Hello))
            answer(peer)

    before = num_open_files()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        greeting = handshake(Path(listener.getsockname()).parent, role, "m", seconds)
    except errors.ExpertdError:
        thread.join()
        assert num_open_files() == before
        raise
    thread.join()
    assert hellos == [Hello(protocol=PROTOCOL_VERSION, role=role, model="m")]
    return greeting


def sending(message: object, num_descriptors: int = 0) -> Answer:
    def answer(peer: socket.socket) -> None:
        packet = message if isinstance(message, bytes) else msgspec.json.encode(message)
        with open("/dev/null") as null:  # noqa: PTH123
            socket.send_fds(peer, [packet], [null.fileno()] * num_descriptors)

    return answer


def test_welcome_with_descriptors(listener: socket.socket) -> None:
    before = num_open_files()
    with greet(listener, sending(WELCOME, 3)) as greeting:
        assert greeting.welcome == WELCOME
        assert len(greeting.descriptors) == 3
        assert not any(os.get_inheritable(fd) for fd in greeting.descriptors)
        assert dict(greeting.credentials) == {
            "expertd-token": "t",
            "expertd-incarnation": "i",
        }
        greeting.close()
    assert num_open_files() == before


def test_reader_gets_none(listener: socket.socket) -> None:
    with greet(listener, sending(WELCOME), Role.READER) as greeting:
        assert greeting.descriptors == ()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NOT_FOUND", errors.NotFoundError),
        ("PERMISSION_DENIED", errors.PermissionDeniedError),
        ("RESOURCE_EXHAUSTED", errors.CapacityError),
        ("FAILED_PRECONDITION", errors.PreconditionError),
        ("INVALID_ARGUMENT", errors.InvalidInputError),
        ("A_NEW_ONE", errors.ExpertdError),
    ],
)
def test_refusal(listener: socket.socket, code: str, kind: type[errors.ExpertdError]) -> None:
    with pytest.raises(kind, match=r"^because$") as raised:
        greet(listener, sending(Refusal(code, "because")))
    assert type(raised.value) is kind


@pytest.mark.parametrize("num_descriptors", [0, 2, 4, 60])
def test_wrong_number_of_descriptors(listener: socket.socket, num_descriptors: int) -> None:
    with pytest.raises(errors.PreconditionError, match="same version"):
        greet(listener, sending(WELCOME, num_descriptors))


def test_descriptors_nobody_asked_for(listener: socket.socket) -> None:
    with pytest.raises(errors.PreconditionError):
        greet(listener, sending(WELCOME, 3), Role.READER)


@pytest.mark.parametrize(
    "packet", [b"{}", b"hello", b"\xff\x00", b'{"type":"welcome"}', b"[" * 3000, b"x" * 5000]
)
def test_garbage(listener: socket.socket, packet: bytes) -> None:
    with pytest.raises(errors.PreconditionError):
        greet(listener, sending(packet, 3))


def test_hang_up(listener: socket.socket) -> None:
    with pytest.raises(errors.UnavailableError, match="was closed during attach"):
        greet(listener, lambda peer: None)


def test_silence(listener: socket.socket) -> None:
    with pytest.raises(errors.DeadlineError, match=r"0\.1 s"):
        greet(listener, lambda peer: peer.recv(1), seconds=0.1)  # type: ignore[arg-type]


def test_full_backlog(listener: socket.socket, tmp_path: Path) -> None:
    waiting = []
    for _ in range(8):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.setblocking(False)
        waiting.append(peer)
        try:
            peer.connect(str(tmp_path / ATTACH_SOCKET))
        except BlockingIOError:
            break
    before = num_open_files()
    with pytest.raises(errors.DeadlineError):
        handshake(tmp_path, Role.WORKER, "m", 0.1)
    assert num_open_files() == before
    for peer in waiting:
        peer.close()


def test_nobody_there(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(errors.UnavailableError, match="expertd serve --socket") as raised:
            handshake(directory, Role.WORKER, "m", 1)
        assert str(directory) in str(raised.value)


def test_stale_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / ATTACH_SOCKET))
    with pytest.raises(errors.UnavailableError, match="refused"):
        handshake(tmp_path, Role.WORKER, "m", 1)


def test_another_program_s_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / ATTACH_SOCKET))
        listener.listen()
        with pytest.raises(errors.PreconditionError, match="not expertd's"):
            handshake(tmp_path, Role.WORKER, "m", 1)


def test_too_long_a_path(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidInputError, match="at most 107"):
        handshake(tmp_path / ("x" * 100), Role.WORKER, "m", 1)

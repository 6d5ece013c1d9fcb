"""The worker's side of the attach socket: the handshake that begins a session."""

import os
import socket
import time
from array import array
from pathlib import Path

import msgspec

from expertstore.errors import (
    DeadlineError,
    PreconditionError,
    UnavailableError,
)
from expertstore.shared.handshake import (
    ATTACH_SOCKET,
    INCARNATION_KEY,
    MAX_PACKET_BYTES,
    PROTOCOL_VERSION,
    TOKEN_KEY,
    Hello,
    Refusal,
    Role,
    Welcome,
    socket_path,
)
from expertstore.shared.unreachable import connect_error, silent_listener
from expertstore.status import from_refusal

NUM_WORKER_DESCRIPTORS = 3
CONNECT_RETRY_SECONDS = 0.002

_INT_BYTES = array("i").itemsize
_ANSWER = msgspec.json.Decoder(Welcome | Refusal)


class DescriptorsError(PreconditionError):
    """The daemon's descriptors did not get through to this process."""


class Greeting:
    """An accepted handshake: the daemon's welcome, the connection, the descriptors.

    A context manager that closes the descriptors and, unless it was taken, the connection,
    which ends the session.
    """

    def __init__(self, welcome: Welcome, connection: socket.socket, descriptors: list[int]) -> None:
        self.welcome = welcome
        self.descriptors = tuple(descriptors)
        self._connection: socket.socket | None = connection

    def __enter__(self) -> "Greeting":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def credentials(self) -> tuple[tuple[str, str], ...]:
        """The metadata that every RPC of the session carries."""
        return (
            (TOKEN_KEY, self.welcome.token),
            (INCARNATION_KEY, self.welcome.incarnation),
        )

    def take_connection(self) -> socket.socket:
        """The connection, from now on the caller's to close."""
        connection, self._connection = self._connection, None
        if connection is None:
            raise ValueError("the connection was taken or closed")
        return connection

    def close(self) -> None:
        """Closes what is still here; a second call does nothing."""
        descriptors, self.descriptors = self.descriptors, ()
        _close_all(descriptors)
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def handshake(directory: Path, role: Role, model: str, timeout_seconds: float) -> Greeting:
    """Begins a session with the daemon that serves in ``directory``.

    Raises UnavailableError if none does, DeadlineError if it does not answer in time,
    PermissionDeniedError, and whatever the daemon refuses with.
    """
    deadline = time.monotonic() + timeout_seconds
    connection = _connect(directory, deadline, timeout_seconds)
    try:
        hello = Hello(protocol=PROTOCOL_VERSION, role=role, model=model)
        packet, descriptors = _exchange(
            connection, msgspec.json.encode(hello), directory, deadline, timeout_seconds
        )
        try:
            welcome = _read_answer(packet, descriptors, role, directory)
            connection.settimeout(None)
        except BaseException:
            _close_all(descriptors)
            raise
    except BaseException:
        connection.close()
        raise
    return Greeting(welcome, connection, descriptors)


def _connect(directory: Path, deadline: float, timeout_seconds: float) -> socket.socket:
    path = socket_path(directory, ATTACH_SOCKET)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        while True:
            connection.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                connection.connect(os.fsencode(path))
            except (TimeoutError, BlockingIOError):
                # A Unix socket with a timeout does not wait for a full backlog to drain.
                if time.monotonic() >= deadline:
                    raise _too_slow(directory, timeout_seconds) from None
                time.sleep(CONNECT_RETRY_SECONDS)
            else:
                return connection
    except OSError as error:
        connection.close()
        raise connect_error(error, path) from None
    except BaseException:
        connection.close()
        raise


def _exchange(
    connection: socket.socket,
    hello: bytes,
    directory: Path,
    deadline: float,
    timeout_seconds: float,
) -> tuple[bytes, list[int]]:
    """The daemon's answer to ``hello`` and the descriptors that came with it."""
    try:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        connection.send(hello)
        # Not socket.recv_fds: it drops its flags, and a descriptor that an exec inherits
        # would keep the arena's memory from being freed.
        packet, control, flags, _ = connection.recvmsg(
            MAX_PACKET_BYTES,
            socket.CMSG_LEN(NUM_WORKER_DESCRIPTORS * _INT_BYTES),
            socket.MSG_CMSG_CLOEXEC,
        )
    except TimeoutError:
        raise _too_slow(directory, timeout_seconds) from None
    except OSError as error:
        raise _hung_up(directory, f" ({error.strerror})") from None
    descriptors = _descriptors_in(control)
    # Control data is cut where a descriptor did not fit: more than asked for, or this
    # process has no descriptor left.
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close_all(descriptors)
        raise DescriptorsError(
            f"What the expertd at {directory} answered did not fit; run the same version on both "
            "sides, and see that this process may open more files (ulimit -n)."
        )
    return packet, descriptors


def _read_answer(packet: bytes, descriptors: list[int], role: Role, directory: Path) -> Welcome:
    if not packet:
        raise _hung_up(directory)
    try:
        answer: Welcome | Refusal = _ANSWER.decode(packet)
    except msgspec.MsgspecError as error:
        raise PreconditionError(
            f"What answers at {directory} speaks another protocol ({error}); run the same version "
            "of expertd on both sides."
        ) from None
    if isinstance(answer, Refusal):
        raise from_refusal(answer)
    expected = NUM_WORKER_DESCRIPTORS if role is Role.WORKER else 0
    if len(descriptors) != expected:
        raise PreconditionError(
            f"The expertd at {directory} sent {len(descriptors)} descriptors instead of "
            f"{expected}; run the same version on both sides."
        )
    return answer


def _descriptors_in(control: list[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # A cut message may end within a number.
            descriptors.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return list(descriptors)


def _too_slow(directory: Path, timeout_seconds: float) -> DeadlineError:
    within = f"within {timeout_seconds:g} s"
    return DeadlineError(
        silent_listener(directory, f"gave no answer {within}")
        or f"The expertd at {directory} did not answer {within}; it is stopped or overloaded."
    )


def _hung_up(directory: Path, reason: str = "") -> UnavailableError:
    return UnavailableError(
        silent_listener(directory, f"was closed during attach{reason}")
        or f"The expertd at {directory} hung up during attach{reason}; try again."
    )


def _close_all(descriptors: "list[int] | tuple[int, ...]") -> None:
    for descriptor in descriptors:
        os.close(descriptor)

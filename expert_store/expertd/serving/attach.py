"""The attach socket: who may attach, and the descriptors they get."""

import asyncio
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from expertd.hosting.hosted_session import HostedSession
from expertd.log import log, log_warning
from expertd.serving.allow_list import AllowList, peer_of
from expertd.store import Store
from expertstore.errors import (
    ConfigError,
    ExpertdError,
    InvalidInputError,
    PermissionDeniedError,
    PreconditionError,
)
from expertstore.shared.directory import directory_bytes
from expertstore.shared.handshake import (
    MAX_PACKET_BYTES,
    NUDGE,
    PROTOCOL_VERSION,
    Hello,
    Role,
    Welcome,
    decode_hint,
)
from expertstore.shared.session_page import session_page_bytes
from expertstore.status import to_refusal

_HELLO_SECONDS = 5.0
_MAX_PENDING = 64
_ACCEPT_PAUSE_SECONDS = 0.1
_MAX_STALE_HINTS = 16  # skipped in one go; who sends more has others served in between
_WRONG_KIND = (
    "the descriptor that the service manager passed as 'attach' is no listening SOCK_SEQPACKET "
    "socket; use ListenSequentialPacket= in its socket unit."
)


class AttachConnection:
    """One accepted connection; knows its peer and, once it has said hello, its session."""

    def __init__(self, server: "AttachServer", peer: socket.socket) -> None:
        self._server, self._socket = server, peer
        self.pid, self.uid, _ = peer_of(peer)
        self.session: HostedSession | None = None
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(_HELLO_SECONDS, self.close)
        loop.add_reader(peer, self._on_readable)

    def __repr__(self) -> str:
        return f"AttachConnection(pid {self.pid}, uid {self.uid}, {self.session})"

    def nudge(self) -> None:
        """Asks the worker to publish; a full buffer means it was asked already."""
        with suppress(OSError):
            self._socket.send(NUDGE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Hangs up; twice is harmless."""
        if self._socket.fileno() < 0:
            return
        self._deadline.cancel()
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._server.forget(self)

    def _on_readable(self) -> None:
        packet = self._receive()
        if packet is None:
            return
        if self.session is not None:
            self._hear(self.session, packet)
        elif not packet:
            self.close()
        else:
            self._deadline.cancel()
            self._answer(packet)

    def _receive(self) -> bytes | None:
        """The next packet, empty at the connection's end; None if there is none."""
        try:
            return self._socket.recv(MAX_PACKET_BYTES + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _hear(self, session: HostedSession, packet: bytes) -> None:
        """Takes a hint, the newest if several have come."""
        for _ in range(_MAX_STALE_HINTS):
            if not packet:
                break
            following = self._receive()
            if following is None:
                break
            packet = following
        try:
            entries, needed = map(session.model.check_entries, decode_hint(packet))
        except (ValueError, ExpertdError):
            # The end of the process, or something it must not say: either ends the session.
            self._server.store.detach(session)
            return
        with suppress(PreconditionError):  # being unloaded, of which it will hear
            self._server.store.records.expect(session, needed)
            self._server.store.records.prefetch(session, entries, 0)

    def _answer(self, packet: bytes) -> None:
        try:
            hello = self._server.check(packet, self._socket, self.uid)
            store = self._server.store
            self.session = store.attach(hello.role, hello.model, self, self.pid, self.uid)
            self._welcome(self.session)
        except Exception as error:
            # Expected or not: nobody may be left waiting, nor half attached.
            log_warning("attach refused", pid=self.pid, uid=self.uid, cause=error)
            refusal = to_refusal(error)
            self._server.store.refusals["attach", refusal.code] += 1
            with suppress(OSError):
                packet = msgspec.json.encode(refusal)
                self._socket.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self.close()

    def _arena_descriptor(self) -> int:
        """One that can be mapped writable only for our own uid and those that the settings name.

        Our own uid owns the inode: it could change its mode, or write to this very process.
        """
        memory = self._server.store.arena.memory
        if self.uid in self._server.writable_uids:
            return os.dup(memory.fd)
        return memory.open_read_only()

    def _welcome(self, session: HostedSession) -> None:
        store = self._server.store
        welcome = Welcome(session=session.id, token=session.token, incarnation=store.incarnation)
        descriptors: list[int] = []
        try:
            if session.is_worker:
                welcome = msgspec.structs.replace(
                    welcome,
                    arena_bytes=store.arena.num_bytes,
                    directory_bytes=directory_bytes(session.model.num_entries),
                    page_bytes=session_page_bytes(),
                    adoption=store.arena.trailer.adoptions,
                    annex_bytes=session.model.annex_bytes,
                )
                descriptors.append(self._arena_descriptor())
                descriptors.append(session.model.memory.open_read_only())
                descriptors.append(os.dup(session.memory.fd))
            socket.send_fds(
                self._socket,
                [msgspec.json.encode(welcome)],
                descriptors,
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            )
        except OSError as error:
            log_warning("attach failed", pid=self.pid, cause=error)
            store.detach(session)
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        log("attached", session=session.id, pid=self.pid, uid=self.uid, model=session.model_name)


def listen(path: Path, mode: int) -> socket.socket:
    """A socket of our own at ``path``, with permissions ``mode``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def adopt_listener(fd: int, path: Path) -> socket.socket:
    """The socket that the service manager passed, which should listen at ``path``.

    Raises :class:`ConfigError` if it is no such socket.
    """
    try:
        listener = socket.socket(fileno=fd)
    except OSError:  # no socket at all
        os.close(fd)
        raise ConfigError(_WRONG_KIND) from None
    if not _listens(listener):
        listener.close()
        raise ConfigError(_WRONG_KIND)
    where = listener.getsockname()
    if not _is_same_file(where, path):
        listener.close()
        raise ConfigError(
            f"the service manager listens at {where}, but workers look for {path}; give both "
            "the same directory (ListenSequentialPacket= and socket)."
        )
    return listener


def _listens(listener: socket.socket) -> bool:
    accepts = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    kind = (listener.family, listener.type)
    return bool(accepts) and kind == (socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _is_same_file(one: str, other: Path) -> bool:
    try:
        return other.samefile(one)
    except (OSError, ValueError):
        return False


class AttachServer:
    """Listens on ``listener``; the connections it accepts are the sessions' leases."""

    def __init__(
        self,
        store: Store,
        listener: socket.socket,
        allowed: AllowList,
        writable_uids: Iterable[int] = (),
    ) -> None:
        self.store = store
        self._connections: dict[AttachConnection, None] = {}  # in the order of their coming
        self._listener = listener
        self._listener.setblocking(False)
        self._allowed = allowed
        self.writable_uids = frozenset({os.geteuid(), *writable_uids})
        self._listen()

    def check(self, packet: bytes, peer: socket.socket, uid: int) -> Hello:
        """The hello in ``packet``, if that user may say it."""
        if not self._allowed.admits(peer):
            raise PermissionDeniedError(
                f"uid {uid} may not attach to this expertd; {self._allowed.remedy}."
            )
        try:
            hello = msgspec.json.decode(packet[:MAX_PACKET_BYTES], type=Hello)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInputError(f"this is not a hello: {error}.") from error
        if hello.protocol != PROTOCOL_VERSION:
            raise PreconditionError(
                f"the client speaks attach protocol {hello.protocol}, this expertd "
                f"{PROTOCOL_VERSION}; run the same version on both sides."
            )
        if hello.role is Role.ADMIN and uid not in {0, os.geteuid()}:
            raise PermissionDeniedError(
                f"uid {uid} may not load or unload models; only root and expertd's own user may."
            )
        return hello

    def forget(self, connection: AttachConnection) -> None:
        """Takes note that a connection was closed."""
        self._connections.pop(connection, None)

    def close(self) -> None:
        """Stops listening; the sessions stay. Twice is harmless."""
        if self._listener.fileno() < 0:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for connection in [each for each in self._connections if each.session is None]:
            connection.close()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._on_connect)

    def _on_connect(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor left: the listener stays readable, so pause
            log_warning("cannot accept", cause=error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(_ACCEPT_PAUSE_SECONDS, self._listen)
            return
        pending = [connection for connection in self._connections if connection.session is None]
        if len(pending) >= _MAX_PENDING:
            pending[0].close()  # a worker says hello at once, so the longest silent is none
        peer.setblocking(False)
        self._connections[AttachConnection(self, peer)] = None

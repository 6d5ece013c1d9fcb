"""Messages over a socket pair: msgpack, each after its length in four bytes."""

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

from expertstore.errors import InvalidInputError

MessageT = TypeVar("MessageT")
_LENGTH_BYTES = 4
_encode = msgspec.msgpack.Encoder().encode


def check_sendable(message: msgspec.Struct) -> None:
    """Raises InvalidInputError for a message with a number that 64 bits cannot hold."""
    try:
        _encode(message)
    except OverflowError as error:
        raise InvalidInputError(
            "A number of the request has more than 64 bits; give a smaller one."
        ) from error


def _framed(message: msgspec.Struct) -> bytes:
    body = _encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class Frames(Generic[MessageT]):
    """Puts messages together from bytes as they come."""

    def __init__(self, kind: Any) -> None:  # noqa: ANN401 - a type or a union of some
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(kind)
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[MessageT]:
        """The messages that ``data`` completes."""
        self._bytes += data
        messages = []
        begin = 0
        while len(self._bytes) - begin >= _LENGTH_BYTES:
            body = begin + _LENGTH_BYTES
            end = body + int.from_bytes(self._bytes[begin:body], "little")
            if end > len(self._bytes):
                break
            messages.append(self._decoder.decode(memoryview(self._bytes)[body:end].tobytes()))
            begin = end
        del self._bytes[:begin]
        return messages


class BlockingLink(Generic[MessageT]):
    """The engine's end: one thread reads, any may send."""

    def __init__(self, end: socket.socket, kind: Any) -> None:  # noqa: ANN401
        self._socket = end
        self._frames: Frames[MessageT] = Frames(kind)
        self._sending = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError if the other end is gone."""
        with self._sending:
            self._socket.sendall(_framed(message))

    def receive(self) -> list[MessageT] | None:
        """What came, after a wait; None once the other end is gone."""
        try:
            data = self._socket.recv(1 << 18)
        except ConnectionError:
            return None
        return self._frames.feed(data) if data else None


class LoopLink(asyncio.Protocol, Generic[MessageT]):
    """The front's end, in its event loop."""

    def __init__(
        self,
        kind: Any,  # noqa: ANN401
        on_message: Callable[[MessageT], None],
        on_end: Callable[[], None],
    ) -> None:
        self._frames: Frames[MessageT] = Frames(kind)
        self._on_message = on_message
        self._on_end = on_end
        self._transport: asyncio.WriteTransport | None = None

    def send(self, message: msgspec.Struct) -> None:
        """Dropped if the other end is gone, which :meth:`connection_lost` says."""
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(_framed(message))

    def close(self) -> None:
        """Ends the connection, once what was sent is written."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        for message in self._frames.feed(data):
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._on_end()

"""HTTP connections that must say soon, and in few words, what they want."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_SECONDS = 30.0
"""From a connection's beginning, and from each later request's, to the end of its headers."""
MAX_HEAD_BYTES = 64 << 10
MAX_AHEAD = 32
"""Requests that a connection may send before it is their turn."""
LINGER_SECONDS = 5.0
"""For a request's rest, once it is answered: a client that is cut off at once may miss why."""
LAST_SECONDS = 1.0
"""When the server ends: for a connection that it has taken, and whose request is on its way."""
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\ncontent-length: 35\r\nconnection: close\r\n\r\n"
    b"The request's headers are too long."
)


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's, whose connections end if no whole head comes in :data:`HEAD_SECONDS`.

    Otherwise a client could hold any number of connections open by a byte now and then, or fill the
    memory with headers or requests. And a client that connected just before the server's end is
    answered, not cut off.
    """

    _impatient: asyncio.TimerHandle | None = None
    _ends = False
    _in_head = False
    _head_bytes = 0
    _answered: RequestResponseCycle | None = None
    """The request whose turn it is; ``cycle`` is the last that came."""

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - an asyncio.Transport
        """Of asyncio."""
        super().connection_made(transport)
        self._close_after(HEAD_SECONDS)

    def shutdown(self) -> None:
        """Of uvicorn, at the server's end."""
        if self.cycle is not None:
            super().shutdown()
            return
        self._settle()
        self._ends = True
        self._close_after(LAST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._settle()
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self._cut_off()

    def on_message_begin(self) -> None:
        """Of httptools."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._impatient is None:
            self._close_after(HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of httptools, which calls it for what follows a body in pieces as well."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Of httptools."""
        self._settle()
        self._in_head = False
        if len(self.pipeline) >= MAX_AHEAD:
            self._cut_off()
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        if self._ends:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Of httptools."""
        if self.transport.is_closing():
            return
        if self.cycle.response_complete:
            self._settle()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Of uvicorn."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._close_after(LINGER_SECONDS)

    def _close_after(self, seconds: float) -> None:
        self._settle()
        self._impatient = self.loop.call_later(seconds, self._cut_off)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _cut_off(self) -> None:
        self._forget()
        self.transport.close()

    def _forget(self) -> None:
        """Nothing is written to a connection that is closed: uvicorn sees to the last request."""
        self.pipeline.clear()
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _settle(self) -> None:
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None

"""HTTP connections that must say soon what they want."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0
"""From a connection's beginning to the end of its first request's headers."""


LAST_SECONDS = 1.0
"""When the server ends: for a connection that it has taken, and whose request is on its way."""


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's, whose connections end if no whole head comes in :data:`HEAD_SECONDS`.

    Otherwise a client could hold any number of connections open by a byte now and then. And a
    client that connected just before the server's end is answered, not cut off.
    """

    _impatient: asyncio.TimerHandle | None = None
    _ends = False

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - an asyncio.Transport
        """Of asyncio."""
        super().connection_made(transport)
        self._impatient = self.loop.call_later(HEAD_SECONDS, transport.close)

    def shutdown(self) -> None:
        """Of uvicorn, at the server's end."""
        if self.cycle is not None:
            super().shutdown()
            return
        self._settle()
        self._ends = True
        self._impatient = self.loop.call_later(LAST_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._settle()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Of httptools."""
        self._settle()
        super().on_headers_complete()
        if self._ends:
            self.cycle.keep_alive = False

    def _settle(self) -> None:
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None

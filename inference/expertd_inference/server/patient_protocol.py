"""HTTP connections that must say soon what they want."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0
"""From a connection's beginning to the end of its first request's headers."""


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's, whose connections end if no whole head comes in :data:`HEAD_SECONDS`.

    Otherwise a client could hold any number of connections open by a byte now and then.
    """

    _impatient: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - an asyncio.Transport
        """Of asyncio."""
        super().connection_made(transport)
        self._impatient = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._settle()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Of httptools."""
        self._settle()
        super().on_headers_complete()

    def _settle(self) -> None:
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None

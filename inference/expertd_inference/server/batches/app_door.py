"""Asks this process's own application, without a connection."""

import asyncio
import secrets
import traceback
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.types import ASGIApp

from expertd_inference.server.batches.batch_file import BatchRequest
from expertd_inference.server.batches.batch_run import Reply

BATCHES = "batches"
"""Whose requests they are to the application where nobody has a name."""


class AppDoor:
    """Asks an ASGI application for ``user``."""

    def __init__(self, app: ASGIApp, user: str = "") -> None:
        self._app = app
        self._user = user

    async def __call__(self, request: BatchRequest) -> Reply:
        """Of :data:`.batch_run.Ask`; it raises nothing."""
        request_id = f"req_{secrets.token_hex(16)}"
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.url,
            "raw_path": request.url.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": (BATCHES, 0),
            "server": None,
            "state": {"user": self._user or BATCHES},
        }
        messages = iter([{"type": "http.request", "body": msgspec.json.encode(request.body)}])
        status, headers, body = 500, {}, bytearray()

        async def receive() -> MutableMapping[str, Any]:
            if (message := next(messages, None)) is not None:
                return message
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message.get("headers", ()))
            else:
                body.extend(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        except Exception:  # a bug, which the application has answered; the log gets it
            traceback.print_exc()
        return Reply(status, request_id, bytes(body), seconds_of(headers.get(b"retry-after")))


def seconds_of(retry_after: bytes | None) -> float | None:
    """What the header says, if it says a number of seconds."""
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else None

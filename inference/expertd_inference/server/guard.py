"""What stands before all routes: keys, other sites' pages, clients that do not read."""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import msgspec

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.keys import Keys
from expertd_inference.server.pages.files import PAGE_FILES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = {"/health", "/ping", "/version", *PAGE_FILES}
"""What needs no key: it tells nothing about anybody."""
WRITE_SECONDS = 60.0
"""A client that reads nothing for so long is cut off."""
REQUEST_ID = b"x-request-id"


class Guard:
    """An ASGI application around another: lets requests through, or answers them itself."""

    def __init__(
        self,
        app: App,
        *,
        keys: Keys | None,
        accounts: Accounts,
        origins: tuple[str, ...],
        say: Callable[[str], None],
        anybody: bool = False,
    ) -> None:
        """``origins`` are sites whose pages may ask, beside this server's own; ``*`` is all.

        Without ``keys`` the server must be asked for by an address or as localhost, unless
        ``anybody`` may ask: else a page could reach it under a name of its own that leads here
        (DNS rebinding).
        """
        self._any_host = anybody or keys is not None or "*" in origins
        self._hosts = {"localhost", *(urlsplit(origin).hostname for origin in origins)}
        self._app = app
        self._keys = keys
        self._accounts = accounts
        self._origins = origins
        self._say = say
        self._complained: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI; for HTTP alone."""
        headers = dict(scope["headers"])
        wanted = headers.get(REQUEST_ID, b"")[:128]
        identity = wanted if wanted.isascii() and wanted else secrets.token_hex(8).encode()
        sending = _sending(send, identity)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            self._check_key(scope, headers)
        except ApiError as error:
            names = {name.decode("latin-1") for name in headers}
            await _refuse(error.body_for(scope["path"], names), error, sending)
            return
        await self._app(scope, receive, sending)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self._any_host or not host or _name_of(host) in self._hosts or _is_address(host):
            return
        raise ApiError(
            403,
            f"This server has no keys, and is not asked for as {host[:200]!r}: use localhost or "
            "an address, or start it with --keys, or with --cors-origin and that site.",
            code="host_not_allowed",
        )

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Refuses what a page of another site asks for: it has no business here unless told."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2] == headers.get(b"host", b"").decode("latin-1"):
            return
        raise ApiError(
            403,
            f"Pages of {origin[:200]!r} may not use this server; --cors-origin lets them.",
            code="origin_not_allowed",
        )

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._keys is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        key = _key_of(headers)
        found = self._keys.find(key)
        if self._keys.complaint != self._complained:
            self._complained = self._keys.complaint
            if self._complained is not None:
                self._say(self._complained)
        if found is None:
            raise ApiError(
                401,
                f"{'There is no such API key here' if key else 'This server wants an API key'}; "
                "send yours as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )
        name, limits = found
        state = scope.setdefault("state", {})
        state["user"], state["limits"] = name, limits
        if scope["method"] != "POST":
            return
        wait = self._accounts.seconds_until_request(name, limits, time.monotonic())
        if wait:
            raise ApiError(
                429,
                f"{name} has used up its requests or tokens of this minute; retry in "
                f"{math.ceil(wait)} s.",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=math.ceil(wait),
            )


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ip_address(_name_of(host) or "")
    except ValueError:
        return False
    return True


def _key_of(headers: dict[bytes, bytes]) -> str:
    bearer = headers.get(b"authorization", b"").decode("latin-1")
    scheme, _, key = bearer.partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1")


def _sending(send: Send, identity: bytes) -> Send:
    """``send`` with the request's id in the head, which gives up on a client that reads nothing."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, identity)]
        async with asyncio.timeout(WRITE_SECONDS):
            await send(message)

    return sending


async def _refuse(said: dict[str, Any], error: ApiError, send: Send) -> None:
    body = msgspec.json.encode(said)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if error.status == 401:
        # Some clients of Anthropic ask again for minutes unless they are told.
        headers += [(b"www-authenticate", b"Bearer"), (b"x-should-retry", b"false")]
    if (wait := error.more.get("retry_after")) is not None:
        headers.append((b"retry-after", str(wait).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

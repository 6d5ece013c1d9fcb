"""What all routes share."""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from expertd_inference.server.batches.batches import BatchRoom
from expertd_inference.server.hosting.catalog import Catalog, Entry
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.server.metrics import ServerMetrics
from expertstore.errors import InvalidInputError

MAX_BODY_BYTES = 8 << 20
"""A million tokens, by their numbers or as text. Tokenizing text takes many times its memory."""

LONG_BYTES = 128 << 10
"""Requests that are longer are prepared one at a time."""
body_bytes: ContextVar[int] = ContextVar("body_bytes", default=0)
"""How long the body of the request is which this task answers."""
ResultT = TypeVar("ResultT")


@dataclass
class Front:
    """The models, and the limits of a request. ``say`` writes a line of the log."""

    catalog: Catalog
    metrics: ServerMetrics
    say: Callable[[str], None]
    max_body_bytes: int = MAX_BODY_BYTES
    stopping: bool = False
    """Whether it only lets what was begun end."""
    room: BatchRoom = field(default_factory=BatchRoom)
    request_templates: bool = False
    """Whether requests may bring a chat template: a program, which may run for ever."""
    _long: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def model(self, name: str | None) -> tuple[Entry, ModelText]:
        """The model that a request names, and its tokenizer. Raises ExpertdError."""
        entry = await self.catalog.find(name)
        return entry, await self.catalog.text(entry)

    async def aside(self, function: Callable[[], ResultT]) -> ResultT:
        """What ``function`` makes of a request, in a thread: no other request waits for it.

        Long ones wait for one another: tokenizing a text takes a hundred times its memory.
        """
        if body_bytes.get() <= LONG_BYTES:
            return await asyncio.to_thread(function)
        async with self._long:
            return await asyncio.to_thread(function)

    def check_template(self, template: str | None) -> None:
        """Raises InvalidInputError if a request brings a template, and none may."""
        if template is not None and not self.request_templates:
            raise InvalidInputError(
                "chat_template is a program, which this server takes from nobody's request; start "
                "it with --request-templates, or with --chat-template FILE."
            )


def front_of(request: Request) -> Front:
    """That of the application which got the request."""
    front: Front = request.app.state.front
    return front


def user_of(request: Request) -> str:
    """Whose request it is, to share fairly: the key's name, else the host that it came from."""
    name: str | None = getattr(request.state, "user", None)
    return name or (request.client.host if request.client else "")


def new_id(prefix: str) -> str:
    """Of one answer."""
    return f"{prefix}{secrets.token_hex(16)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())

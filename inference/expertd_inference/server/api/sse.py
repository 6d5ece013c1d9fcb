"""Server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from starlette.responses import StreamingResponse

from expertd_inference.server.api.errors import ApiError, api_error_of

KEEP_ALIVE_SECONDS = 10.0
"""After so long without an event a comment is sent, so that nobody believes the stream is dead."""
DONE = b"data: [DONE]\n\n"
_COMMENT = b": still computing\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: Any, name: str | None = None) -> bytes:  # noqa: ANN401 - what msgspec encodes
    """One event, with a name if given."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _encode(data) + b"\n\n"


def error_events(error: ApiError) -> list[bytes]:
    """The last events of a stream that broke, as OpenAI has them."""
    return [event(error.openai()), DONE]


async def stream_events(
    events: AsyncIterator[bytes],
    on_error: Any = error_events,  # noqa: ANN401 - ApiError -> events
    media_type: str = "text/event-stream",
    comment: bytes | None = _COMMENT,
) -> StreamingResponse:
    """Answers with ``events`` as they come; ``comment`` keeps the connection, if there is one.

    The first is waited for, so that a request that fails at once has an HTTP status of its own;
    but not longer than :data:`KEEP_ALIVE_SECONDS`. Raises what the first one raises.
    """
    first = asyncio.ensure_future(anext(events, None))
    try:
        await asyncio.wait({first}, timeout=KEEP_ALIVE_SECONDS)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return StreamingResponse(
        _kept_alive(first, events, on_error, comment),
        media_type=media_type,
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _kept_alive(
    following: "asyncio.Future[bytes | None]",
    events: AsyncIterator[bytes],
    on_error: Any,  # noqa: ANN401
    comment: bytes | None,
) -> AsyncGenerator[bytes]:
    try:
        while True:
            await asyncio.wait({following}, timeout=KEEP_ALIVE_SECONDS)
            if not following.done():
                if comment is not None:
                    yield comment
                continue
            data = following.result()
            if data is None:
                return
            yield data
            following = asyncio.ensure_future(anext(events, None))
    except Exception as error:
        for last in on_error(api_error_of(error)):
            yield last
    finally:
        # The client is gone, or all is said: the generator below ends its sequences.
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        if isinstance(events, AsyncGenerator):
            await events.aclose()

"""Reads a request's JSON into a typed structure, and what all interfaces ask of a model."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from expertd_inference.server.api.errors import ApiError

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
ResultT = TypeVar("ResultT")
BODY_SECONDS = 60.0
"""In which a request's body must be there."""
_named: set[tuple[str, str]] = set()
"""Unknown fields that the log has already, by path."""


async def read_body(request: Request, kind: type[BodyT], say: Callable[[str], None]) -> BodyT:
    """The request's JSON as a ``kind``; ``say`` is told once of each field that means nothing here.

    Raises ApiError for anything else.
    """
    length = request.headers.get("content-length", "")
    most = request.app.state.front.max_body_bytes
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError as late:
        raise ApiError(
            408, f"The request was not complete after {BODY_SECONDS:g} s.", code="timeout"
        ) from late
    except ClientDisconnect as gone:
        raise ApiError(400, "The client left before its request was complete.") from gone
    try:
        fields = msgspec.json.decode(bytes(body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object.")
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    for name in fields.keys() - known:
        if (request.url.path, name) not in _named and len(_named) < 1000:
            _named.add((request.url.path, name))
            say(f"{request.url.path}: the field {name!r:.80} is not known, and changes nothing")
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        param = place.strip("`$").removeprefix(".") or None
        where = f"{param}: " if param else ""
        raise ApiError(400, f"{where}{message}.", param=param) from error


async def unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """What ``work`` returns; it is cancelled if the client leaves. Raises what it raises."""
    working: asyncio.Task[ResultT] = asyncio.create_task(work)
    gone: asyncio.Task[None] = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client left before the answer was complete.")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"The request has more than {most} bytes, the most that this server reads."
    )

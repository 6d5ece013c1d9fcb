"""Reads a request's JSON into a typed structure, and what all interfaces ask of a model."""

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar, get_args

import msgspec
from starlette.requests import ClientDisconnect, Request

from expertd_inference.server.api.errors import NO_NAMES, ApiError, asked_names
from expertd_inference.server.front import LONG_BYTES, body_bytes, front_of

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
ResultT = TypeVar("ResultT")
BODY_SECONDS = 60.0
"""In which a request's body must be there."""
MAX_NAMED = 1000
MAX_MARKS = 1 << 20
"""Commas and brackets, of which JSON has one for each value. Nothing else goes on while they are
read, and a value takes up to a hundred bytes of memory: a tenth of a second for lists, 100 MiB.
"""
_HALF = rb"\\u[dD][%b][0-9a-fA-F]{2}"
_ESCAPE = re.compile(
    _HALF % b"89abAB" + _HALF % b"c-fC-F" + b"|(" + _HALF % b"89a-fA-F" + rb")|\\."
)
"""JSON's escapes; the group is half of a character without the other half beside it."""
_MISSING = re.compile("Object missing required field `(.*)`")
_named: set[tuple[str, str]] = set()
"""What has no effect and is in the log already, by path."""


async def read_body(request: Request, kind: type[BodyT], say: Callable[[str], None]) -> BodyT:
    """The request's JSON as a ``kind``; ``say`` is told once of each field without an effect.

    ``idle`` of a kind are those that are known to have none, ``names`` what it calls fields of
    OpenAI's. Raises ApiError for anything else.
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
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_MARKS:
        raise ApiError(
            413,
            f"The request has more than {MAX_MARKS} commas and brackets, the most that this "
            "server reads; send fewer tokens or messages.",
        )
    body_bytes.set(len(body))
    asked_names.set(NO_NAMES)
    read = partial(_read, bytes(body), kind)
    # Else the server would do nothing but read where several long ones come.
    made, useless = await front_of(request).aside(read) if len(body) > LONG_BYTES else read()
    for name, why in useless:
        say_once(request, f"the field {name!r:.80} {why}", say)
    asked_names.set(getattr(made, "names", NO_NAMES))
    return made


def _read(body: bytes, kind: type[BodyT]) -> tuple[BodyT, list[tuple[str, str]]]:
    """A body, and which of its fields have no effect for which reason."""
    try:
        with _no_collections():
            fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, _why_no_json(body, error)) from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object; send one.")
    useless = [*islice(_without_effect(fields, kind), MAX_NAMED)]
    return in_form(fields, kind), useless


def in_form(fields: dict[str, Any], kind: type[BodyT]) -> BodyT:
    """A ``kind`` of these fields. Raises ApiError for a value of another type."""
    try:
        with _no_collections():
            return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        param = place.strip("`$").removeprefix(".") or None
        if (found := _MISSING.fullmatch(message)) is not None:
            param = f"{param}.{found[1]}" if param else found[1]
            raise ApiError(400, f"{param} is missing; give it.", param=param) from error
        where = f"{param}: " if param else ""
        raise ApiError(400, f"{where}{message}.", param=param) from error


def _why_no_json(body: bytes, error: Exception) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"The body is not JSON: its byte {wrong.start} is not UTF-8."
    for found in _ESCAPE.finditer(body):
        if half := found[1]:
            return (
                f"The body has {half.decode()} (byte {found.start()}), which is one half of a "
                "character (a lone surrogate); send the whole character."
            )
    return f"The body is not JSON: {str(error).partition(' - at ')[0]}."


@contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection in the block, which makes many values and no garbage.

    The collector would look at all values again and again while they become more, and takes ten
    times as long as reading lists does.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def say_once(request: Request, what: str, say: Callable[[str], None]) -> None:
    """For what has no effect: a line of the log for each path."""
    if (request.url.path, what) not in _named and len(_named) < MAX_NAMED:
        _named.add((request.url.path, what))
        say(f"{request.url.path}: {what}")


def _without_effect(
    fields: dict[str, Any], kind: type[msgspec.Struct]
) -> Iterator[tuple[str, str]]:
    """Those that are not known, or whose structure says so; those in other structures, too."""
    known = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    idle: frozenset[str] = getattr(kind, "idle", frozenset())
    for name, value in fields.items():
        if name not in known:
            yield name, "is not known, and changes nothing"
        elif name in idle and value not in (None, False):
            yield name, "changes nothing here"
        elif isinstance(value, dict):
            for one in get_args(known[name]) or (known[name],):
                if isinstance(one, type) and issubclass(one, msgspec.Struct):
                    yield from ((f"{name}.{inner}", why)
                                for inner, why in _without_effect(value, one))  # fmt: skip


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
        413,
        f"The request has more than {most} bytes, the most that this server reads (--max-body); "
        "send less.",
    )

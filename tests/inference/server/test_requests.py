"""Requests and streams whose clients leave, send too much, or wait long."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from expertd_inference.engine.channel import Channel
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.server.api import sse
from expertd_inference.server.api.answering import chat_request
from expertd_inference.server.api.completions import CompletionRequest
from expertd_inference.server.api.continuing import interleaved
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.models import health, list_chats
from expertd_inference.server.api.requests import read_body, unless_gone
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import StepFailedError
from tests.inference.server.said import streamed

LEAVES = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def request(*messages: dict[str, Any], length: str = "", **front: Any) -> Request:
    """What a client sends, to a front with these attributes."""
    coming = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(coming)

    state = SimpleNamespace(front=SimpleNamespace(max_body_bytes=10, **front))
    headers = [(b"content-length", length.encode())] if length else []
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    return Request({**scope, "app": SimpleNamespace(state=state)}, receive)


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (request(length="11"), 413, "more than 10 bytes, the most that this server reads"),
        (request(part(b"{      ", more=True), part(b"    }", more=False)), 413, "more than 10"),
        (request(part(b"{", more=True), LEAVES), 400, "left before its request was complete"),
    ],
    ids=["said", "sent", "half"],
)
async def test_bodies(given: Request, status: int, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        await read_body(given, CompletionRequest, print)
    assert refused.value.status == status
    assert words in refused.value.message


async def test_as_much_as_is_read() -> None:
    given = request(part(b"{      ", more=True), part(b"  }", more=False), length="10")
    assert (await read_body(given, CompletionRequest, print)).prompt is None


async def test_a_client_that_leaves_ends_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    given = request(part(b"", more=False), LEAVES)
    with pytest.raises(ApiError, match="left before the answer was complete") as gone:
        async with asyncio.timeout(HANG_SECONDS):
            await unless_gone(given, work())
    assert gone.value.status == 499
    assert ended.is_set()


async def test_a_stream_that_says_nothing_for_long_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.01)
    wait = asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        await wait.wait()
        yield b"data: 1\n\n"
        raise StepFailedError("No.")

    async def body(comment: bytes | None) -> AsyncIterator[bytes]:
        answer = await sse.stream_events(events(), comment=comment)
        return answer.body_iterator  # type: ignore[return-value]

    coming = await body(b":\n\n")
    assert [await anext(coming) for _ in range(2)] == [b":\n\n"] * 2
    silent = await body(None)
    first = asyncio.ensure_future(anext(silent))
    assert await anext(coming) == b":\n\n"
    assert not first.done()
    wait.set()
    assert await first == b"data: 1\n\n"
    rest = [one async for one in coming if one != b":\n\n"]
    assert rest[0] == b"data: 1\n\n"
    assert b'"message":"No."' in rest[1]
    assert rest[2:] == [sse.DONE]
    assert [one async for one in silent] == rest[1:]


async def test_a_client_that_leaves_before_the_first_event_ends_the_stream() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        yield b""

    waiting = asyncio.ensure_future(streamed(events(), sse.error_events))
    async with asyncio.timeout(HANG_SECONDS):
        await begun.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await ended.wait()


async def test_one_continuation_that_fails_fails_all() -> None:
    cancelled: list[int] = []
    channels: list[Channel[Token]] = [Channel() for _ in range(3)]
    streams = [
        TokenStream(channel, partial(cancelled.append, at), num_prompt_tokens=1)
        for at, channel in enumerate(channels)
    ]
    channels[0].send([Token(1, "a")])
    said = interleaved(streams)
    async with asyncio.timeout(HANG_SECONDS):
        index, token = await anext(said)
        assert (index, token.id) == (0, 1)
        channels[1].end(StepFailedError("No."))
        with pytest.raises(StepFailedError, match=r"No\."):
            await anext(said)
    assert {0, 2} <= {*cancelled}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "messages is missing; give it."),
        ({"messages": [], "seed": "x"}, "seed: Expected `int | null`, got `str`."),
        ({"messages": [], "stop": None, "n": None}, None),
    ],
)
def test_a_chat_in_other_interfaces_fields(fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert chat_request(fields).stop is None
        return
    with pytest.raises(ApiError) as refused:
        chat_request(fields)
    assert (refused.value.status, refused.value.message) == (400, message)


async def test_health_and_kept_chats() -> None:
    assert (await health(request(stopping=False))).status_code == 200
    stopping = await health(request(stopping=True))
    assert (stopping.status_code, stopping.body) == (503, b'{"status":"stopping"}')
    assert b'"data":[],"has_more":false' in (await list_chats(request())).body

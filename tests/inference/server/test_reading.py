"""A long body is read in bounded time, beside the others."""

import gc
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request

from expertd_inference.server.api.completions import CompletionRequest
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.requests import read_body
from expertd_inference.server.front import LONG_BYTES, Front

VALUES = 100_000


def request_of(body: bytes) -> Request:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    front = Front(cast("Any", None), cast("Any", None), print)
    app = SimpleNamespace(state=SimpleNamespace(front=front))
    url = SimpleNamespace(path="/v1/completions")
    return cast("Request", SimpleNamespace(headers={}, app=app, stream=stream, url=url))


async def test_no_garbage_is_collected_while_values_are_read() -> None:
    collections: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    gc.callbacks.append(note)
    try:
        body = b'{"prompt": [' + b"[1]," * VALUES + b"[1]]}"
        read = await read_body(request_of(body), CompletionRequest, print)
    finally:
        gc.callbacks.remove(note)
    assert len(cast("list[Any]", read.prompt)) == VALUES + 1
    # It was due many times, and is so once the body is read.
    assert len(collections) < VALUES / 5000
    assert gc.isenabled()


@pytest.mark.parametrize("body", [b'{"prompt": [', b'{"prompt": 1.5}'], ids=["syntax", "type"])
async def test_garbage_is_collected_after_a_body_that_is_none(body: bytes) -> None:
    with pytest.raises(ApiError):
        await read_body(request_of(body), CompletionRequest, print)
    assert gc.isenabled()


async def test_collections_that_were_off_stay_off() -> None:
    gc.disable()
    try:
        await read_body(request_of(b'{"prompt": "a"}'), CompletionRequest, print)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("is_long", [False, True])
async def test_a_long_body_is_read_in_another_thread(
    is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(
        "expertd_inference.server.api.requests._without_effect",
        lambda *_: iter([threads.append(threading.current_thread()) or ("x", "changes nothing")]),
    )
    said: list[str] = []
    body = b'{"prompt": "%s"}' % (b"a" * (LONG_BYTES if is_long else 1))
    request = request_of(body)
    await read_body(request, CompletionRequest, said.append)
    assert [one is not threading.main_thread() for one in threads] == [is_long]

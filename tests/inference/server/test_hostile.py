"""Clients that mean no good: bodies and heads of every kind, and connections that never end."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvloop

from expertd_inference.server import patient_protocol
from expertd_inference.server.guard import Receive, Scope, Send
from expertd_testing.patience import HANG_SECONDS
from tests.inference.server.test_guard import listening, make

ROOT = Path(__file__).parents[3]
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": ' + DEEP.encode(), "nested too deep"),
        (b'{"prompt": "a", "metadata": {"a": ' + DEEP.encode(), "nested too deep"),
        (b'{"prompt": "\xff\xfe"}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "one half of a character"),
        (b'{"prompt": "a"', "not JSON"),
        (b"", "not JSON"),
        (json.dumps({"prompt": ["a"] * 10_000}).encode(), "prompt is a list of 10000; give 1 to"),
        (json.dumps({"prompt": [[1]] * 10_000}).encode(), "prompt is a list of 10000; give 1 to"),
        (json.dumps({"prompt": "a", "n": 10**9}).encode(), "n is 1000000000; give 1 to"),
        (json.dumps({"prompt": "a", "stop": ["b"] * 10_000}).encode(), "stop has 10000 texts"),
        (b'{"prompt": "a", "max_tokens": 1e999}', "out of range"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", "out of range"),
        (b'{"prompt": [18446744073709551615]}', "18446744073709551615"),
        (json.dumps({"prompt": [10**30]}).encode(), "more than 64 bits"),
        (json.dumps({"prompt": "a", "top_k": 10**30}).encode(), "more than 64 bits"),
        (json.dumps({"prompt": "a", "priority": 10**30}).encode(), "more than 64 bits"),
    ],
)
def test_bodies(http: httpx2.Client, content: bytes, says: str) -> None:
    refused = http.post("/v1/completions", content=content)
    assert refused.status_code == 400, refused.text
    assert says in refused.json()["error"]["message"]


@pytest.mark.parametrize("piece", [b"-1,", b"[" * 500 + b"]" * 500 + b","])
def test_more_values_than_are_read(http: httpx2.Client, piece: bytes) -> None:
    content = b'{"prompt": [' + piece * (3_300_000 // len(piece)) + b"1]}"
    refused = http.post("/v1/completions", content=content)
    assert refused.status_code == 413
    assert "commas and brackets" in refused.json()["error"]["message"]


def _nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": _nested(400)}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": _nested(400)}}]},
        {"chat_template_kwargs": {"a": _nested(450)}},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}],
                }
            ]
        },
    ],
)
def test_what_is_nested_as_deep_as_it_can_be_read(
    http: httpx2.Client, fields: dict[str, Any]
) -> None:
    """It is answered or refused; nothing fails that we did not expect."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code in (200, 400), answer.text
    assert http.get("/health").status_code == 200


@asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[Any]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Until the server closes the connection; a reset is an end, too."""
    found = b""
    while True:
        try:
            piece = await asyncio.wait_for(reader.read(1 << 16), HANG_SECONDS)
        except ConnectionError:
            return found
        if not piece:
            return found
        found += piece


async def test_headers_without_end() -> None:
    line = b"X-More: " + b"x" * 1000 + b"\r\n"
    async with listening(make()) as address, connected(address) as (reader, writer):
        writer.write(b"GET /who HTTP/1.1\r\nHost: localhost\r\n")
        writer.writelines([line] * (2 * patient_protocol.MAX_HEAD_BYTES // len(line)))
        assert (await read_to_the_end(reader)).startswith(b"HTTP/1.1 431 ")


async def test_a_body_of_pieces_may_be_longer_than_a_head() -> None:
    async with listening(make()) as address, httpx2.AsyncClient() as client:

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(200):
                yield b"x" * 1000

        url = f"http://{address[0]}:{address[1]}/who"
        assert (await client.post(url, content=pieces())).status_code == 200


async def test_a_later_head_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection's first request buys it no time."""
    monkeypatch.setattr(patient_protocol, "HEAD_SECONDS", 0.3)
    async with listening(make()) as address, connected(address) as (reader, writer):
        writer.write(b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\nGET /who HTTP/1.1\r\nX-Slow: ")
        dripping = asyncio.create_task(_drip(writer))
        found = await read_to_the_end(reader)
        dripping.cancel()
        assert found.startswith(b"HTTP/1.1 200 ")
        assert found.count(b"HTTP/1.1") == 1


async def test_a_body_that_nobody_wants_and_that_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patient_protocol, "LINGER_SECONDS", 0.3)
    async with listening(make()) as address, connected(address) as (reader, writer):
        writer.write(
            b"POST /none HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        dripping = asyncio.create_task(_drip(writer, b"1\r\nx\r\n"))
        found = await read_to_the_end(reader)
        dripping.cancel()
        assert found.startswith(b"HTTP/1.1 404 ")


async def _drip(writer: asyncio.StreamWriter, drop: bytes = b"x") -> None:
    while True:
        writer.write(drop)
        await asyncio.sleep(0.02)


async def test_requests_ahead_of_their_answers() -> None:
    request = b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with listening(make()) as address:
        async with connected(address) as (reader, writer):
            writer.write(
                request * 4 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            )
            assert (await read_to_the_end(reader)).count(b"HTTP/1.1 200") == 5
        async with connected(address) as (reader, writer):
            writer.write(request * 1000)
            assert (await read_to_the_end(reader)).count(b"HTTP/1.1") < 100


async def test_what_follows_a_body_is_no_header() -> None:
    """It could go on without end, and is not what the keys were looked up by."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        seen.extend(name for name, _ in scope["headers"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with listening(app) as address, connected(address) as (reader, writer):
        writer.write(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            b"1\r\nx\r\n0\r\nX-Late: 1\r\n\r\n"
        )
        assert (await read_to_the_end(reader)).startswith(b"HTTP/1.1 204 ")
    assert seen == [b"transfer-encoding", b"connection"]


def test_who_leaves_before_their_turn_is_forgotten() -> None:
    """Nothing is written to a connection that is gone, which uvloop takes for a mistake."""
    failures: list[Exception] = []

    async def stream(_: Scope, __: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(20):
                await send({"type": "http.response.body", "body": b"token", "more_body": True})
                await asyncio.sleep(0.01)
        except Exception as error:
            failures.append(error)

    async def leave() -> None:
        async with listening(stream) as address:
            for _ in range(5):
                async with connected(address) as (reader, writer):
                    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
                    await reader.read(1000)
            await asyncio.sleep(0.5)

    uvloop.run(leave())
    assert not failures


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /wh\xffo HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /who HTTP/9.9\r\n\r\n",
        b"GET /who HTTP/1.1\r\nX-Request-Id: a\x7fb\r\n\r\n",
        b"GET /who HTTP/1.1\r\nX-Request-Id: a\tb\r\n\r\n",
        b"GET /who HTTP/1.1\r\nOrigin: http://[\r\n\r\n",
        b"POST /who HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /who HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /who HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
async def test_heads(head: bytes) -> None:
    """Each is answered, or its connection ended; the next one is served."""
    async with listening(make()) as address:
        async with connected(address) as (reader, writer):
            writer.write(head)
            writer.write_eof()
            found = await read_to_the_end(reader)
            assert b" 500 " not in found.partition(b"\r\n")[0]
        async with httpx2.AsyncClient() as client:
            answered = await client.get(f"http://{address[0]}:{address[1]}/who")
            assert answered.status_code == 200


FEW_DESCRIPTORS = """
import asyncio, resource, socket, time
import httpx2, uvloop
from tests.inference.server.test_guard import listening, make

async def main():
    async with listening(make()) as address:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        waiting = []
        # Each of ours takes two descriptors of the same process.
        for _ in range(64):
            try:
                one = socket.socket()
                one.setblocking(False)
                waiting.append(one)
                one.connect_ex(address)
            except OSError:
                break
            await asyncio.sleep(0.001)
        cpu = time.process_time()
        await asyncio.sleep(0.5)
        busy = time.process_time() - cpu
        for one in waiting:
            one.close()
        await asyncio.sleep(0.1)
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://{address[0]}:{address[1]}/who")
        print(len(waiting), answer.status_code, busy < 0.25)

uvloop.run(main())
"""


def test_no_descriptor_is_left() -> None:
    """Nothing spins, and whoever comes once there are some is served."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS],
        capture_output=True,
        text=True,
        timeout=3 * HANG_SECONDS,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    num, status, calm = done.stdout.split()
    assert int(num) > 20
    assert (status, calm) == ("200", "True"), done.stderr

"""Ways to ask a server: this process's own, and one by its URL."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.batches.app_door import AppDoor
from expertd_inference.server.batches.batch_file import BatchRequest
from expertd_inference.server.batches.limited_door import LimitedDoor
from expertd_inference.server.batches.url_door import UrlDoor
from expertd_inference.server.front import user_of
from expertd_inference.server.keys import KeyLimits
from expertstore.errors import InvalidInputError, PreconditionError, UnavailableError

ASKED = BatchRequest(custom_id="a", method="POST", url="/v1/completions", body={"prompt": "é"})


def app_of(status: int = 200, *, fails: bool = False) -> Starlette:
    async def complete(request: Request) -> Response:
        if fails:
            raise ZeroDivisionError
        told = {"body": await request.json(), "user": user_of(request)}
        return JSONResponse(told, status, {"Retry-After": "7"})

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


async def test_the_application_is_asked_without_a_connection() -> None:
    reply = await AppDoor(app_of(429), "alice")(ASKED)
    assert (reply.status, reply.retry_seconds) == (429, 7)
    assert reply.body == '{"body":{"prompt":"é"},"user":"alice"}'.encode()
    assert reply.request_id.startswith("req_")
    assert b'"user":"batches"' in (await AppDoor(app_of())(ASKED)).body


async def test_a_bug_of_the_application_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert (await AppDoor(app_of(fails=True))(ASKED)).status == 500
    assert "ZeroDivisionError" in capsys.readouterr().err


class Known:
    """Keys, of which alice has one."""

    def limits_of(self, name: str) -> KeyLimits | None:
        return KeyLimits(sha256="", requests_per_minute=1200.0) if name == "alice" else None


async def test_a_user_s_limits_hold_for_batches() -> None:
    accounts, keys = Accounts(), Known()
    door = LimitedDoor(app_of(), accounts, keys, "alice")  # type: ignore[arg-type]
    limits = keys.limits_of("alice")
    assert limits is not None
    now = time.monotonic()
    while not (wait := accounts.seconds_until_request("alice", limits, now)):
        pass
    assert (await door(ASKED)).status == 200
    assert time.monotonic() >= now + wait
    with pytest.raises(PreconditionError, match="bob has no key any more"):
        await LimitedDoor(app_of(), accounts, keys, "bob")(ASKED)  # type: ignore[arg-type]
    assert (await LimitedDoor(app_of(), accounts, None, "")(ASKED)).status == 200


@asynccontextmanager
async def answering(answer: bytes) -> AsyncGenerator[tuple[str, list[bytes]]]:
    """A server that answers whatever comes so; its URL and what it got."""
    got: list[bytes] = []

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(line for line in head.splitlines() if line.startswith(b"Content-Length"))
        got.append(head + await reader.readexactly(int(size.split()[1])))
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(answer_one, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", got


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-request-id: r\r\n\r\n"
    b"3\r\n{}\n\r\n2\r\n[]\r\n0\r\n\r\n"
)


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/", "/below/v1"])
async def test_a_server_is_asked_by_its_url(base: str) -> None:
    async with answering(CHUNKED) as (url, got):
        reply = await UrlDoor(url + base, "secret")(ASKED)
    assert (reply.status, reply.request_id, reply.body) == (200, "r", b"{}\n[]")
    below = "/below" if base.startswith("/below") else ""
    assert got[0].startswith(f"POST {below}/v1/completions HTTP/1.1\r\n".encode())
    assert b"\r\nAuthorization: Bearer secret\r\n" in got[0]
    assert got[0].endswith('\r\n\r\n{"prompt":"é"}'.encode())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}",
        b"nothing of the kind\r\n\r\n",
    ],
)
async def test_half_an_answer_is_none(answer: bytes) -> None:
    async with answering(answer) as (url, _):
        with pytest.raises(UnavailableError, match=f"The server at {url} does not answer: "):
            await UrlDoor(url)(ASKED)


async def test_a_server_that_is_not_there() -> None:
    async with answering(b"") as (url, _):
        pass
    with pytest.raises(UnavailableError, match="does not answer"):
        await UrlDoor(url)(ASKED)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://host", "http://", "http://[::1", "http://a/ä"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InvalidInputError, match=r"--url .* is no URL"):
        UrlDoor(url)


def test_what_is_no_key() -> None:
    with pytest.raises(InvalidInputError, match="The API key has"):
        UrlDoor("http://lab", "a\n")

"""What stands before all routes."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from expertd_inference.server import guard, patient_protocol
from expertd_inference.server.accounts import Accounts
from expertd_inference.server.front import user_of
from expertd_inference.server.guard import App, Guard
from expertd_inference.server.keys import Keys, digest
from expertd_testing.patience import HANG_SECONDS

KEY = "ek-alice"
Ask = Callable[..., Awaitable[httpx2.Response]]


async def _who(request: Request) -> Response:
    return PlainTextResponse(user_of(request))


async def _flood(_: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0)  # else nobody hears that the client has left
            yield b"x" * (1 << 20)

    return StreamingResponse(pieces())


def make(
    keys: Keys | None = None,
    origins: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
    *,
    anybody: bool = False,
) -> Guard:
    routes = [
        Route("/v1/messages", _who, methods=["GET", "POST"]),
        Route("/who", _who, methods=["GET", "POST"]),
        Route("/health", _who),
        Route("/flood", _flood),
    ]
    return Guard(
        Starlette(routes=routes),
        keys=keys,
        accounts=Accounts(),
        origins=origins,
        say=say,
        anybody=anybody,
    )


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.alice]\nsha256 = "{digest(KEY)}"\nrequests_per_minute = 2\n')
    return Keys(path)


async def ask(app: Guard, method: str, path: str, **headers: str | bytes) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


async def test_keys(keys: Keys) -> None:
    app = make(keys)
    refused = await ask(app, "GET", "/who")
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "wants an API key; send" in refused.json()["error"]["message"]
    assert refused.headers["www-authenticate"] == "Bearer"
    # Clients of Anthropic try again for minutes otherwise.
    assert refused.headers["x-should-retry"] == "false"
    assert (await ask(app, "GET", "/who", authorization=f"Bearer {KEY}")).text == "alice"
    assert (await ask(app, "GET", "/who", x_api_key=KEY)).text == "alice"
    refused = await ask(app, "GET", "/who", authorization="Bearer ek-bob")
    assert refused.status_code == 401
    assert "no such API key" in refused.json()["error"]["message"]
    assert (await ask(app, "GET", "/health")).status_code == 200
    assert (await ask(app, "GET", "/v1/messages")).json()["type"] == "error"
    # A browser asks first whether it may, and sends no key with that.
    assert (await ask(app, "OPTIONS", "/who")).status_code == 405


async def test_a_broken_file_of_keys_is_told_of_once(keys: Keys, tmp_path: Path) -> None:
    said: list[str] = []
    app = make(keys, say=said.append)
    path = tmp_path / "keys.toml"
    good = path.read_text()
    for text in ("[keys", good):
        path.write_text(text)
        for _ in range(2):
            answer = await ask(app, "GET", "/who", authorization=f"Bearer {KEY}")
            assert answer.text == "alice"
    assert len(said) == 1
    assert said[0].endswith(" The keys that were read before still count.")


async def test_limits(keys: Keys) -> None:
    app = make(keys)
    bearer = f"Bearer {KEY}"
    codes = [(await ask(app, "POST", "/who", authorization=bearer)).status_code for _ in range(2)]
    refused = await ask(app, "POST", "/who", authorization=bearer)
    assert [*codes, refused.status_code] == [200, 200, 429]
    assert 0 < int(refused.headers["retry-after"]) <= 30
    assert "alice has used up" in refused.json()["error"]["message"]
    assert (await ask(app, "GET", "/who", authorization=bearer)).status_code == 200


async def test_pages_of_other_sites() -> None:
    app = make(origins=("https://chat.lab",))
    for origin, status in (
        ("http://localhost", 200),
        ("https://chat.lab", 200),
        ("https://evil.example", 403),
        ("null", 403),
    ):
        assert (await ask(app, "POST", "/who", origin=origin)).status_code == status
    assert (await ask(make(origins=("*",)), "POST", "/who", origin="null")).status_code == 200


async def test_a_request_s_id_comes_back() -> None:
    app = make()
    assert (await ask(app, "GET", "/who", x_request_id="mine")).headers["x-request-id"] == "mine"
    assert len((await ask(app, "GET", "/who")).headers["x-request-id"]) == 16
    long = await ask(app, "GET", "/who", x_request_id="x" * 200)
    assert long.headers["x-request-id"] == "x" * 128
    odd = await ask(app, "GET", "/who", x_request_id=b"caf\xe9")
    assert len(odd.headers["x-request-id"]) == 16


@asynccontextmanager
async def running(app: App) -> AsyncIterator[tuple[uvicorn.Server, tuple[str, int]]]:
    config = uvicorn.Config(
        app, port=0, http=patient_protocol.PatientProtocol, lifespan="off", log_level="critical"
    )
    bound = config.bind_socket()
    server = uvicorn.Server(config)
    bound.listen()
    serving = asyncio.create_task(server.serve([bound]))
    try:
        yield server, bound.getsockname()[:2]
    finally:
        server.should_exit = server.force_exit = True
        await serving
        # A connection that was cut ends a moment later; the loop must not end before.
        async with asyncio.timeout(HANG_SECONDS):
            while server.server_state.connections:  # noqa: ASYNC110 - uvicorn tells nobody
                await asyncio.sleep(0.01)


@asynccontextmanager
async def listening(app: App) -> AsyncIterator[tuple[str, int]]:
    async with running(app) as (_, address):
        yield address


async def test_a_head_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_protocol, "HEAD_SECONDS", 0.3)
    async with listening(make()) as address:
        slow = [await asyncio.open_connection(*address) for _ in range(20)]
        for _, writer in slow:
            writer.write(b"GET /who HTTP/1.1\r\nX-Slow: ")
        async with httpx2.AsyncClient() as client:
            answered = await client.get(f"http://{address[0]}:{address[1]}/who")
            assert answered.status_code == 200
        for reader, writer in slow:
            assert await asyncio.wait_for(reader.read(), HANG_SECONDS) == b""
            writer.close()


ASKS = b"GET /who HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def until_refused(address: tuple[str, int]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while True:
            try:
                _, writer = await asyncio.open_connection(*address)
            except (ConnectionRefusedError, ConnectionResetError):
                return
            writer.close()
            await asyncio.sleep(0.01)


async def test_at_the_end_a_request_on_its_way_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patient_protocol, "LAST_SECONDS", 1000)
    async with running(make()) as (server, address):
        late, idle = [await asyncio.open_connection(*address) for _ in range(2)]
        idle[1].write(ASKS)
        assert await idle[0].readuntil(b"\r\n\r\n")
        server.should_exit = True
        await until_refused(address)
        assert await asyncio.wait_for(idle[0].read(), HANG_SECONDS) == b"127.0.0.1"
        late[1].write(ASKS)
        answer = await asyncio.wait_for(late[0].read(), HANG_SECONDS)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"\r\nconnection: close\r\n" in answer
        for _, writer in (late, idle):
            writer.close()


async def test_at_the_end_nobody_is_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_protocol, "LAST_SECONDS", 0.1)
    async with running(make()) as (server, address):
        reader, writer = await asyncio.open_connection(*address)
        server.should_exit = True
        await until_refused(address)
        assert await asyncio.wait_for(reader.read(), HANG_SECONDS) == b""
        writer.close()


async def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WRITE_SECONDS", 0.3)
    async with listening(make()) as address:
        deaf = socket.create_connection(address)
        deaf.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        deaf.setblocking(False)
        await asyncio.sleep(0.6)
        loop, received = asyncio.get_running_loop(), 0
        deadline = time.monotonic() + HANG_SECONDS
        # What was on its way is there; then the connection ends, though the answer has no end.
        while True:
            assert time.monotonic() < deadline
            try:
                data: Any = await loop.sock_recv(deaf, 1 << 20)
            except ConnectionError:
                break
            if not data:
                break
            received += len(data)
        deaf.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("chat.lab", 200),
        ("trap.site:8080", 403),
        ("localhost.trap.site", 403),
        ("[broken", 403),
    ],
)
async def test_without_keys_no_name_of_another_site_leads_here(host: str, status: int) -> None:
    origins = ("https://chat.lab",)
    assert (await ask(make(origins=origins), "GET", "/who", host=host)).status_code == status
    assert (await ask(make(anybody=True), "GET", "/who", host=host)).status_code == 200


async def test_with_keys_any_name_leads_here(keys: Keys) -> None:
    asked = await ask(make(keys), "GET", "/who", host="lab", authorization=f"Bearer {KEY}")
    assert asked.status_code == 200

"""What ``expert-run chat`` makes of servers, ours and others."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from expertd_inference.cli.chat_client import ChatClient, Delta
from expertstore.errors import (
    ExpertdError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)


class Other(ThreadingHTTPServer):
    """A server that answers whatever it was told to answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.says = b""
        self.asked: list[tuple[str, dict[str, str], Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Other

    def do_GET(self) -> None:
        size = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(size)) if size else None
        self.server.asked.append((self.path, dict(self.headers), body))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.says)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Other]:
    with Other() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def models(*described: dict[str, Any]) -> bytes:
    return json.dumps({"data": described}).encode()


def events(*said: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in said)


def delta(**parts: Any) -> dict[str, Any]:
    return {"choices": [{"delta": parts}]}


DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_url_with_and_without_the_version(server: Other, end: str) -> None:
    server.says = models({"id": "a"})
    assert ChatClient(server.url + end, "secret").model(None) == "a"
    path, headers, _ = server.asked[0]
    assert (path, headers["Authorization"]) == ("/v1/models", "Bearer secret")
    assert ChatClient(server.url + end).answers(5.0)
    path, headers, _ = server.asked[1]
    assert path == "/health"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "url", ["lab:8080", "ftp://lab", "http://", "http://[", "http://a:99999", "http://a/ä"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InvalidInputError, match="is no URL"):
        ChatClient(url)


@pytest.mark.parametrize("key", ["a\n", "schlüssel"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(InvalidInputError, match="The API key has"):
        ChatClient("http://lab", key)


def test_whether_there_is_a_server(server: Other) -> None:
    server.status = 401
    assert ChatClient(server.url).answers(5.0)
    assert not ChatClient("http://127.0.0.1:9").answers(5.0)


def test_which_model(server: Other) -> None:
    client = ChatClient(server.url)
    server.says = models({"id": "a"}, {"id": "b", "parent": "a"})
    assert client.model(None) == "a", "the other is a name of it"
    assert client.model("b") == "b"
    with pytest.raises(NotFoundError, match="no model 'c'; give --model one of: a, b"):
        client.model("c")
    server.says = models({"id": "a"}, {"id": "b"})
    with pytest.raises(NotFoundError, match="has 2 models; name one with --model: a, b"):
        client.model(None)
    for says in (b"", b"[]", b"{}", b'{"data": 3}', b'{"data": [{}]}'):
        server.says = says
        with pytest.raises(UnavailableError, match="lists no models"):
            client.model(None)


def test_an_answer_comes_in_pieces(server: Other) -> None:
    server.says = (
        events(delta(role="assistant"), delta(reasoning_content="Hm"), delta(reasoning="!"))
        + b": a comment\n\n"
        + events(delta(content="Yes"), delta(content=""), {"choices": []})
        + DONE
        + events(delta(content="never"))
    )
    asked = [{"role": "user", "content": "Hello"}]
    found = [*ChatClient(server.url).answer(asked, {"model": "a"})]
    assert found == [Delta(reasoning="Hm"), Delta(reasoning="!"), Delta("Yes")]
    path, _, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {"model": "a", "messages": asked, "stream": True}


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (events(delta(content="Yes")), "ended the answer before it was complete"),
        (b"data: {\n\n", "The server's answer broke off"),
        (events({"error": {"message": "The engine is gone."}}), "The engine is gone."),
        (events({"error": {"code": 3}}), "{'code': 3}"),
        (events({"error": "No."}), "No."),
        (events(["no event"]), "The server's answer broke off"),
        (events({"choices": [3]}), "The server's answer broke off"),
    ],
)
def test_an_answer_that_breaks(server: Other, says: bytes, message: str) -> None:
    server.says = says
    with pytest.raises(UnavailableError) as broken:
        [*ChatClient(server.url).answer([], {})]
    assert message in str(broken.value)


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, {"error": {"message": "No."}}, InvalidInputError, "No."),
        (404, {"error": {"message": "No."}}, NotFoundError, "No."),
        (503, {"error": {"message": "No."}}, UnavailableError, "No."),
        (500, {"error": "No."}, UnavailableError, "The server refused with HTTP status 500."),
        (500, [], UnavailableError, "The server refused with HTTP status 500."),
    ],
)
def test_refusals(
    server: Other, status: int, body: Any, kind: type[ExpertdError], message: str
) -> None:
    server.status, server.says = status, json.dumps(body).encode()
    with pytest.raises(kind) as refused:
        [*ChatClient(server.url).answer([], {})]
    assert str(refused.value) == message
    assert type(refused.value) is kind

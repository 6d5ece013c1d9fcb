"""Asks a server for chats by OpenAI's interface; needs nothing but Python."""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, build_opener
from urllib.request import Request as HttpRequest

from expertd_inference.server.keys import check_key
from expertstore.errors import ExpertdError, InvalidInputError, NotFoundError, UnavailableError

SILENCE_SECONDS = 300.0
"""After so long without a word a server is taken for dead; ours sends comments meanwhile."""
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class Delta:
    """A piece of an answer."""

    content: str = ""
    reasoning: str = ""


class ChatClient:
    """Talks to the server at ``url``, with or without ``/v1``. Raises InvalidInputError."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise InvalidInputError(f"{url!r} is no URL: {error}.") from error
        known = parts.scheme in ("http", "https") and parts.path.isascii()
        if not (known and parts.hostname):
            raise InvalidInputError(f"{url!r} is no URL of a server, such as http://HOST:8080.")
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self._headers = {"Content-Type": "application/json"}
        check_key(api_key)
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # What is on this host is never reached by a proxy.
        proxies: dict[str, str] | None = {} if parts.hostname in _LOOPBACK else None
        self._opener: OpenerDirector = build_opener(
            ProxyHandler(proxies), HTTPHandler(), HTTPSHandler()
        )

    def answers(self, seconds: float) -> bool:
        """Whether there is a server at all."""
        try:
            self._opener.open(f"{self.url.removesuffix('/v1')}/health", timeout=seconds).close()
        except HTTPError:
            return True
        except (OSError, HTTPException):
            return False
        return True

    def model(self, name: str | None) -> str:
        """The model of that name, without a name the only one. Raises NotFoundError."""
        try:
            with self._open("/models") as response:
                models = json.load(response)["data"]
            names = [str(model["id"]) for model in models]
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"What is at {self.url} lists no models: {error}.") from error
        if name is None:
            names = [str(model["id"]) for model in models if not model.get("parent")]
        elif name in names:
            names = [name]
        else:
            raise NotFoundError(
                f"The server has no model {name!r}; give --model one of: {', '.join(names)}."
            )
        if len(names) != 1:
            raise NotFoundError(
                f"The server has {len(names)} models; name one with --model: {', '.join(names)}."
            )
        return names[0]

    def answer(
        self, messages: Sequence[Mapping[str, str]], fields: Mapping[str, Any]
    ) -> Generator[Delta]:
        """The next message, as it comes; closing the iterator stops it. Raises ExpertdError."""
        body = {**fields, "messages": [*messages], "stream": True}
        with self._open("/chat/completions", json.dumps(body).encode()) as response:
            try:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield from _deltas(json.loads(data))
            except (OSError, HTTPException, ValueError, TypeError, AttributeError) as error:
                raise UnavailableError(f"The server's answer broke off: {error}.") from error
        raise UnavailableError("The server ended the answer before it was complete.")

    def _open(self, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401
        request = HttpRequest(f"{self.url}{path}", body, self._headers)
        try:
            return self._opener.open(request, timeout=SILENCE_SECONDS)
        except HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise UnavailableError(
                f"No server answers at {self.url}: {reason}; start one with expert-run "
                "serve, or name another with --url."
            ) from error


def _deltas(event: dict[str, Any]) -> Iterator[Delta]:
    if "error" in event:
        error = event["error"]
        raise UnavailableError(
            str(error.get("message", error) if isinstance(error, dict) else error)
        )
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if reasoning or delta.get("content"):
            yield Delta(delta.get("content") or "", reasoning)


def _refusal(status: int, body: bytes) -> ExpertdError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"The server refused with HTTP status {status}."
    kind = {400: InvalidInputError, 404: NotFoundError}.get(status, UnavailableError)
    return kind(message)

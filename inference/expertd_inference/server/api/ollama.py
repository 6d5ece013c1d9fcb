"""Ollama's ``/api/chat`` and ``/api/generate``."""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.api.answering import Answering, answering, continuing
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.logprobs import chat_logprob
from expertd_inference.server.api.ollama_request import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    chat_fields,
    generate_fields,
    model_name,
)
from expertd_inference.server.api.requests import read_body, unless_gone
from expertd_inference.server.api.sse import stream_events
from expertd_inference.server.chat.answer import Piece
from expertd_inference.server.front import Front, front_of, user_of

LINES = "application/x-ndjson"


async def ollama_chat(request: Request) -> Response:
    """``POST /api/chat``."""
    front = front_of(request)
    body = await read_body(request, OllamaChatRequest, front.say)
    if not body.messages:
        empty = {"message": {"role": "assistant", "content": ""}}
        return await _load(front, body, empty)
    asked = await answering(front, chat_fields(body))
    return await _respond(request, body, _Answer(asked, body, is_chat=True))


async def ollama_generate(request: Request) -> Response:
    """``POST /api/generate``."""
    front = front_of(request)
    body = await read_body(request, OllamaGenerateRequest, front.say)
    if not body.prompt:
        return await _load(front, body, {"response": ""})
    fields = generate_fields(body)
    if body.raw or body.suffix:
        asked = await continuing(front, body.prompt, fields, body.suffix)
    else:
        asked = await answering(front, fields)
    return await _respond(request, body, _Answer(asked, body, is_chat=False))


async def _load(
    front: Front, body: OllamaChatRequest | OllamaGenerateRequest, empty: dict[str, Any]
) -> Response:
    """What Ollama does when nothing is asked: it loads the model."""
    if body.is_unload:
        raise ApiError(
            400,
            "This server does not end engines when asked to; it does so when they are idle "
            "(--idle-seconds).",
            param="keep_alive",
        )
    entry = await front.catalog.find(model_name(body.model))
    await entry.hosted.ready()
    line = {"model": body.model, "created_at": _time(), **empty, "done": True}
    data = msgspec.json.encode({**line, "done_reason": "load"})
    return Response(data, media_type="application/json")


async def _respond(
    request: Request, body: OllamaChatRequest | OllamaGenerateRequest, answer: "_Answer"
) -> Response:
    user = user_of(request)
    if body.stream is not False:
        return await stream_events(answer.lines(user), _error_lines, LINES, None)
    data = msgspec.json.encode(await unless_gone(request, answer.whole(user)))
    return Response(data, media_type="application/json")


class _Answer:
    """One answer."""

    def __init__(
        self,
        asked: Answering,
        body: OllamaChatRequest | OllamaGenerateRequest,
        *,
        is_chat: bool,
    ) -> None:
        self._asked = asked
        self._body = body
        self._is_chat = is_chat
        self._began = time.monotonic_ns()
        self._loaded = self._first = self._began

    async def whole(self, user: str) -> dict[str, Any]:
        """All at once."""
        content, thinking = "", ""
        calls: list[Any] = []
        logprobs: list[Any] = []
        async for token, piece in self._pieces(user):
            content += piece.content
            thinking += piece.reasoning
            calls += piece.calls
            logprobs += self._logprobs(token)
        return self._line(content, thinking, calls, logprobs, self._ending())

    async def lines(self, user: str) -> AsyncGenerator[bytes]:
        """A token each, and the figures."""
        async with aclosing(self._pieces(user)) as pieces:
            async for token, piece in pieces:
                logprobs = self._logprobs(token)
                line = self._line(piece.content, piece.reasoning, piece.calls, logprobs)
                yield _encoded(line)
        yield _encoded(self._line("", "", (), [], self._ending()))

    async def _pieces(self, user: str) -> AsyncGenerator[tuple[Token, Piece]]:
        await self._asked.entry.hosted.ready()
        self._loaded = self._first = time.monotonic_ns()
        async with aclosing(self._asked.pieces(user)) as pieces:
            async for token, piece in pieces:
                if self._first == self._loaded:
                    self._first = time.monotonic_ns()
                yield token, piece

    def _line(
        self,
        content: str,
        thinking: str,
        calls: Any,  # noqa: ANN401
        logprobs: list[Any],
        ending: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"model": self._body.model, "created_at": _time()}
        said: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if calls:
            said["tool_calls"] = [_call(call) for call in calls]
        if self._is_chat:
            line["message"] = {"role": "assistant", "content": content, **said}
        else:
            line |= {"response": content, **said}
        if logprobs:
            line["logprobs"] = logprobs
        return {**line, "done": ending is not None, **(ending or {})}

    def _ending(self) -> dict[str, Any]:
        ended = time.monotonic_ns()
        counter = self._asked.counter
        cut = self._asked.finish_reason is FinishReason.LENGTH
        return {
            "done_reason": "length" if cut else "stop",
            "total_duration": ended - self._began,
            "load_duration": self._loaded - self._began,
            "prompt_eval_count": counter.num_prompt_tokens,
            "prompt_eval_duration": self._first - self._loaded,
            "eval_count": counter.num_new_tokens,
            "eval_duration": ended - self._first,
        }

    def _logprobs(self, token: Token) -> list[Any]:
        if not self._body.logprobs or token.logprob is None:
            return []
        return [chat_logprob(self._asked.text, token.id, (token.logprob, token.top_logprobs))]


def _call(call: Any) -> dict[str, Any]:  # noqa: ANN401
    arguments = json.loads(call.arguments or "{}")
    return {"function": {"name": call.name, "arguments": arguments}}


def _time() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _encoded(line: dict[str, Any]) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def _error_lines(error: ApiError) -> list[bytes]:
    return [_encoded(error.ollama())]

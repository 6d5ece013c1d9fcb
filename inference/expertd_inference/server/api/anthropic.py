"""Anthropic's ``/v1/messages`` and ``count_tokens``."""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.engine.stops import FinishReason
from expertd_inference.server.api.answering import Answering, answering
from expertd_inference.server.api.anthropic_request import MessagesRequest, openai_fields
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.requests import read_body, unless_gone
from expertd_inference.server.api.sse import event, stream_events
from expertd_inference.server.chat.answer import Piece
from expertd_inference.server.front import front_of, new_id, user_of

UNSIGNED = "unsigned"
"""The signature of a model's thoughts, which nobody checks when they come back."""
Event = dict[str, Any]


async def messages(request: Request) -> Response:
    """``POST /v1/messages``."""
    front = front_of(request)
    body = await read_body(request, MessagesRequest, front.say)
    if body.max_tokens is None:
        raise ApiError(
            400, "max_tokens is missing; say how many tokens may come.", param="max_tokens"
        )
    message = _Message(await answering(front, openai_fields(body)), body)
    user = user_of(request)
    if body.stream:
        return await stream_events(message.events(user), _error_events)
    answer = await unless_gone(request, message.answer(user))
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def count_tokens(request: Request) -> Response:
    """``POST /v1/messages/count_tokens``: those of the prompt, as a message would have it."""
    front = front_of(request)
    body = await read_body(request, MessagesRequest, front.say)
    asked = await answering(front, openai_fields(body))
    data = msgspec.json.encode({"input_tokens": asked.num_prompt_tokens})
    return Response(data, media_type="application/json")


class _Message:
    """One answer."""

    def __init__(self, asked: Answering, body: MessagesRequest) -> None:
        self._asked = asked
        self._id = new_id("msg_")
        self._blocks = _Blocks(shows_thinking=body.shows_thinking)

    async def answer(self, user: str) -> dict[str, Any]:
        """All at once."""
        async with aclosing(self._asked.pieces(user)) as pieces:
            async for _, piece in pieces:
                for _ in self._blocks.add(piece):
                    pass
        for _ in self._blocks.end():
            pass
        return self._message(**self._ending, content=self._blocks.content, usage=self._usage)

    async def events(self, user: str) -> AsyncGenerator[bytes]:
        """Named events; the first comes with the first token."""
        begun = False
        async with aclosing(self._asked.pieces(user)) as pieces:
            async for _, piece in pieces:
                if not begun:
                    begun = True
                    opening = self._message(
                        content=[],
                        stop_reason=None,
                        stop_sequence=None,
                        usage={**self._usage, "output_tokens": 1},
                    )
                    yield _named({"type": "message_start", "message": opening})
                    yield _named({"type": "ping"})
                for one in self._blocks.add(piece):
                    yield _named(one)
        for one in self._blocks.end():
            yield _named(one)
        yield _named({"type": "message_delta", "delta": self._ending, "usage": self._usage})
        yield _named({"type": "message_stop"})

    def _message(self, **more: Any) -> dict[str, Any]:  # noqa: ANN401
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._asked.entry.name,
            **more,
        }

    @property
    def _ending(self) -> dict[str, Any]:
        if self._asked.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif self._blocks.num_calls:
            reason = "tool_use"
        elif self._asked.stop is not None:
            reason = "stop_sequence"
        else:
            reason = "end_turn"
        return {
            "stop_reason": reason,
            "stop_sequence": self._asked.stop if reason == "stop_sequence" else None,
        }

    @property
    def _usage(self) -> dict[str, Any]:
        """Anthropic counts what was found in the cache apart."""
        counter = self._asked.counter
        return {
            "input_tokens": counter.num_prompt_tokens - counter.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counter.num_cached_tokens,
            "output_tokens": counter.num_new_tokens,
        }


class _Blocks:
    """The content of a message while it grows; each change is said in events."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self.content: list[Event] = []
        self.num_calls = 0
        self._shows_thinking = shows_thinking
        self._is_open = False

    def add(self, piece: Piece) -> Iterator[Event]:
        """What a piece changes."""
        if piece.reasoning:
            yield from self._in("thinking", {"thinking": "", "signature": ""})
            if self._shows_thinking:
                yield self._grow("thinking", "thinking_delta", "thinking", piece.reasoning)
        if piece.content:
            yield from self._in("text", {"text": ""})
            yield self._grow("text", "text_delta", "text", piece.content)
        for call in piece.calls:
            yield from self.end()
            self.num_calls += 1
            yield from self._open({"type": "tool_use", "id": call.id, "name": call.name})
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
            self.content[-1]["input"] = json.loads(call.arguments or "{}")
            yield from self.end()

    def end(self) -> Iterator[Event]:
        """Of the block that is open, if one is."""
        if not self._is_open:
            return
        block = self.content[-1]
        if block["type"] == "thinking":
            block["signature"] = UNSIGNED
            yield self._delta({"type": "signature_delta", "signature": UNSIGNED})
        self._is_open = False
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _in(self, kind: str, empty: Event) -> Iterator[Event]:
        """Opens a block of a kind unless the last one is."""
        if not (self._is_open and self.content[-1]["type"] == kind):
            yield from self.end()
            yield from self._open({"type": kind, **empty})

    def _open(self, block: Event) -> Iterator[Event]:
        self.content.append(block)
        self._is_open = True
        said = {**block, "input": {}} if block["type"] == "tool_use" else {**block}
        yield {
            "type": "content_block_start",
            "index": len(self.content) - 1,
            "content_block": said,
        }

    def _grow(self, field: str, kind: str, name: str, text: str) -> Event:
        self.content[-1][field] += text
        return self._delta({"type": kind, name: text})

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _named(data: Event) -> bytes:
    return event(data, data["type"])


def _error_events(error: ApiError) -> list[bytes]:
    return [_named(error.anthropic())]

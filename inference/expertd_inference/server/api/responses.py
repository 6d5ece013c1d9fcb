"""OpenAI's ``/v1/responses``, kept ones too."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.api.answering import Answering, answering
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.logprobs import chat_logprob
from expertd_inference.server.api.requests import read_body, say_once, unless_gone
from expertd_inference.server.api.responses_output import Output
from expertd_inference.server.api.responses_request import (
    LOGPROBS,
    ResponsesRequest,
    TextConfig,
    items_of,
    messages_of,
    namespaces_of,
    openai_fields,
    refuse_unserved,
)
from expertd_inference.server.api.responses_store import ResponseStore, Stored
from expertd_inference.server.api.sse import DONE, event, stream_events
from expertd_inference.server.front import front_of, new_id, now, user_of

MAX_ITEMS = 100
"""Of a page of a response's input."""


async def respond(request: Request) -> Response:
    """``POST /v1/responses``."""
    body, asked, earlier = await _read(request)
    user = user_of(request)
    response = _Responding(asked, body, earlier, _store(request), user)
    if body.stream:
        return await stream_events(response.events(), response.failed)
    return _json(await unless_gone(request, response.answer()))


async def count_input_tokens(request: Request) -> Response:
    """``POST /v1/responses/input_tokens``."""
    _, asked, _ = await _read(request)
    return _json({"object": "response.input_tokens", "input_tokens": asked.num_prompt_tokens})


async def get_response(request: Request) -> Response:
    """``GET /v1/responses/{id}``."""
    if request.query_params.get("stream") == "true":
        raise ApiError(400, "A kept response is complete; get it without stream.", param="stream")
    stored = _kept(request, request.path_params["id"])
    return Response(stored.response, media_type="application/json")


async def input_items(request: Request) -> Response:
    """``GET /v1/responses/{id}/input_items``: the last of them first unless ``order`` is asc."""
    items = msgspec.json.decode(_kept(request, request.path_params["id"]).items)
    asked = request.query_params
    if asked.get("order", "desc") == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    try:
        begin = ids.index(asked["after"]) + 1 if "after" in asked else 0
        limit = int(asked.get("limit", MAX_ITEMS))
    except ValueError as error:
        raise ApiError(
            400, f"after names an item of this list, and limit is 1 to {MAX_ITEMS}; mend the query."
        ) from error
    if not 1 <= limit <= MAX_ITEMS:
        raise ApiError(400, f"limit is {limit}; give 1 to {MAX_ITEMS}.", param="limit")
    page = items[begin : begin + limit]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": begin + limit < len(items),
        }
    )


async def delete_response(request: Request) -> Response:
    """``DELETE /v1/responses/{id}``."""
    id_ = request.path_params["id"]
    _kept(request, id_)
    _store(request).delete(user_of(request), id_)
    return _json({"id": id_, "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    """``POST /v1/responses/{id}/cancel``: none runs in the background, so none can be."""
    id_ = request.path_params["id"]
    _kept(request, id_)
    raise ApiError(
        400, f"The response {id_} is complete, and cannot be cancelled; close a stream to end one."
    )


async def _read(request: Request) -> tuple[ResponsesRequest, Answering, list[dict[str, Any]]]:
    front = front_of(request)
    body = await read_body(request, ResponsesRequest, front.say)
    refuse_unserved(body)
    for one in set(body.include or ()) - {LOGPROBS}:
        say_once(request, f"include of {one!r:.80} changes nothing here", front.say)
    earlier = []
    if body.previous_response_id is not None:
        earlier = _kept(request, body.previous_response_id, "previous_response_id").chat
    return body, await answering(front, openai_fields(body, earlier)), earlier


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _kept(request: Request, id_: str, param: str = "response_id") -> Stored:
    stored = _store(request).get(user_of(request), id_)
    if stored is None:
        raise ApiError(
            404,
            f"There is no response {id_!r:.80}: it was not stored, or it was dropped for newer "
            "ones; send the whole conversation as input.",
            code="response_not_found" if param == "response_id" else "previous_response_not_found",
            param=param,
        )
    return stored


class _Responding:
    """One response, while it comes."""

    def __init__(
        self,
        asked: Answering,
        body: ResponsesRequest,
        earlier: list[dict[str, Any]],
        store: ResponseStore,
        user: str,
    ) -> None:
        self._asked = asked
        self._body = body
        self._earlier = earlier
        self._store = store
        self._user = user
        self._id = new_id("resp_")
        self._created = now()
        self._output = Output(namespaces_of(body.tools))
        self._num_events = 0

    async def answer(self) -> dict[str, Any]:
        """All at once."""
        async with aclosing(self._asked.pieces(self._user)) as pieces:
            async for token, piece in pieces:
                for _ in self._output.add(piece, self._logprobs(token)):
                    pass
        for _ in self._output.complete(self._status):
            pass
        return self._completed()

    async def events(self) -> AsyncGenerator[bytes]:
        """Events with numbers; the first ones come with the first token."""
        async with aclosing(self._asked.pieces(self._user)) as pieces:
            async for token, piece in pieces:
                if not self._num_events:
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event({"type": kind, "response": self._resource("in_progress")})
                for one in self._output.add(piece, self._logprobs(token)):
                    yield self._event(one)
        for one in self._output.complete(self._status):
            yield self._event(one)
        yield self._event({"type": f"response.{self._status}", "response": self._completed()})
        yield DONE

    def failed(self, error: ApiError) -> list[bytes]:
        """The last events of a stream that broke."""
        resource = self._resource("failed")
        resource["error"] = {"code": "server_error", "message": error.message}
        return [self._event({"type": "response.failed", "response": resource}), DONE]

    @property
    def _status(self) -> str:
        cut = self._asked.finish_reason is FinishReason.LENGTH
        return "incomplete" if cut else "completed"

    def _completed(self) -> dict[str, Any]:
        resource = self._resource(self._status)
        resource["usage"] = self._usage
        if self._status == "incomplete":
            resource["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            resource["completed_at"] = int(time.time())
        if resource["store"]:
            chat = [*self._earlier, *messages_of(self._body.input, self._earlier)]
            chat += messages_of(self._output.items)
            encode = msgspec.json.encode
            items = items_of(self._body.input)
            kept = Stored(encode(resource), encode(chat), encode(items))
            self._store.put(self._user, self._id, kept)
        return resource

    def _resource(self, status: str) -> dict[str, Any]:
        """What the request said, and defaults where it did not."""
        body, asked = self._body, self._asked
        reasoning = body.reasoning
        text = body.text or TextConfig()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": asked.entry.name,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "output": self._output.items if status != "in_progress" else [],
            "usage": None,
            "tools": [_echo(tool) for tool in body.tools or ()],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "max_tool_calls": body.max_tool_calls,
            "max_output_tokens": body.max_output_tokens,
            "text": {"format": text.format or {"type": "text"}, "verbosity": text.verbosity},
            "reasoning": {
                "effort": None if reasoning is None else reasoning.effort,
                "summary": None if reasoning is None else reasoning.summary,
            },
            "temperature": asked.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "truncation": "disabled",
            "store": body.store is not False,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "user": body.user,
        }

    @property
    def _usage(self) -> dict[str, Any]:
        usage = self._asked.counter.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {
                "reasoning_tokens": usage.completion_tokens_details.reasoning_tokens
            },
            "total_tokens": usage.total_tokens,
        }

    def _logprobs(self, token: Token) -> list[Any]:
        if not self._body.wants_logprobs or token.logprob is None:
            return []
        return [chat_logprob(self._asked.text, token.id, (token.logprob, token.top_logprobs))]

    def _event(self, data: dict[str, Any]) -> bytes:
        numbered = {**data, "sequence_number": self._num_events}
        self._num_events += 1
        return event(numbered, data["type"])


def _echo(tool: dict[str, Any]) -> dict[str, Any]:
    if tool["type"] != "function":
        return tool
    return {"parameters": None, "strict": None, "description": None, **tool}


def _json(value: Any) -> Response:  # noqa: ANN401
    return Response(msgspec.json.encode(value), media_type="application/json")

"""What llama-server has of its own: ``/completion``, ``/infill``, ``/props`` and others."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.api.answering import Answering, chat_request
from expertd_inference.server.api.chat import ChatRequest, chat_of
from expertd_inference.server.api.completions import FINGERPRINT
from expertd_inference.server.api.errors import unsupported
from expertd_inference.server.api.llama_request import (
    InfillRequest,
    LlamaFields,
    LlamaRequest,
    fields_of,
    prompts_of,
)
from expertd_inference.server.api.logprobs import chat_logprob
from expertd_inference.server.api.requests import read_body, unless_gone
from expertd_inference.server.api.sse import event, stream_events
from expertd_inference.server.chat.gaps import gap
from expertd_inference.server.chat.prompt import ChatPrompt, prompt_of
from expertd_inference.server.front import front_of, user_of
from expertd_inference.server.hosting.model_text import ModelText

_SETTINGS = (
    *("seed", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty"),
    *("frequency_penalty", "stop", "ignore_eos", "n_probs", "grammar", "json_schema", "stream"),
)


async def llama_complete(request: Request) -> Response:
    """``POST /completion``."""
    body = await read_body(request, LlamaRequest, front_of(request).say)
    return await _respond(request, body, lambda text: prompts_of(body.prompt, text))


async def infill(request: Request) -> Response:
    """``POST /infill``: the gap between two texts, filled."""
    body = await read_body(request, InfillRequest, front_of(request).say)
    files = [(file.filename, file.text) for file in body.input_extra]

    def prompts(text: ModelText) -> list[list[int]]:
        prompt = gap(text, body.input_prefix, body.input_suffix, body.prompt, files, "input_suffix")
        return [text.encode(prompt)]

    return await _respond(request, body, prompts)


async def _respond(
    request: Request, body: LlamaFields, prompts: Callable[[ModelText], list[list[int]]]
) -> Response:
    front = front_of(request)
    entry, text = await front.model(body.model)

    def begin() -> list[_Completion]:
        fields = chat_request(fields_of(body, text))
        return [
            _Completion(index, body, Answering(entry, text, fields, prompt))
            for index, prompt in enumerate(prompts(text))
        ]

    answers = await front.aside(begin)
    user = user_of(request)
    if body.stream:
        if len(answers) > 1:
            raise unsupported("stream", "takes one prompt here; send a request for each.")
        return await stream_events(answers[0].events(user), lambda error: [event(error.openai())])
    wholes = await unless_gone(request, _all(answers, user))
    return _json(wholes if len(wholes) > 1 else wholes[0])


async def apply_template(request: Request) -> Response:
    """``POST /apply-template``: a chat as the text that the model would continue."""
    return _json({"prompt": (await _chat_prompt(request)).prompt})


async def count_chat_tokens(request: Request) -> Response:
    """``POST /chat/completions/input_tokens``."""
    return _json({"input_tokens": (await _chat_prompt(request)).num_tokens})


async def _chat_prompt(request: Request) -> ChatPrompt:
    front = front_of(request)
    body = await read_body(request, ChatRequest, front.say)
    front.check_template(body.chat_template)
    _, text = await front.model(body.model)
    return await front.aside(lambda: prompt_of(text, chat_of(body)))


async def props(request: Request) -> Response:
    """``GET /props``: what a client may want to know of a model; ``?model=`` chooses."""
    entry, text = await front_of(request).model(request.query_params.get("model"))
    hosted = entry.hosted
    await hosted.ready()
    tokenizer = text.tokenizer
    return _json(
        {
            "default_generation_settings": {
                "n_ctx": hosted.max_tokens,
                "params": {"temperature": text.temperature},
            },
            "total_slots": hosted.num_places,
            "model_alias": entry.name,
            "model_path": str(entry.pack),
            "modalities": {"vision": text.sees, "audio": False},
            "chat_template": text.templates,
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            "build_info": FINGERPRINT,
        }
    )


async def _all(answers: list["_Completion"], user: str) -> list[dict[str, Any]]:
    tasks = [asyncio.create_task(answer.whole(user)) for answer in answers]
    try:
        return [await task for task in tasks]
    finally:
        # One failed, or the client is gone.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Completion:
    """One prompt, continued."""

    def __init__(self, index: int, body: LlamaFields, asked: Answering) -> None:
        self._index = index
        self._body = body
        self._asked = asked
        self._begun = self._first = self._last = time.monotonic()
        self._has_new_line = False

    async def whole(self, user: str) -> dict[str, Any]:
        """All at once."""
        async with aclosing(self._tokens(user)) as coming:
            tokens = [token async for token in coming]
        content = "".join(token.text for token in tokens)
        ids = [token.id for token in tokens] if self._body.return_tokens else []
        return self._chosen(self._ending(content, ids) | self._likely(tokens))

    async def events(self, user: str) -> AsyncGenerator[bytes]:
        """A token each, and the figures."""
        async with aclosing(self._tokens(user)) as tokens:
            async for token in tokens:
                counter = self._asked.counter
                piece = {
                    "index": self._index,
                    "content": token.text,
                    "tokens": [token.id],
                    "stop": False,
                    "id_slot": -1,
                    "tokens_predicted": counter.num_new_tokens,
                    "tokens_evaluated": counter.num_prompt_tokens,
                }
                if self._body.timings_per_token:
                    piece["timings"] = self._timings()
                yield event(piece | self._likely([token]))
        yield event(self._chosen(self._ending("", [])))

    async def _tokens(self, user: str) -> AsyncGenerator[Token]:
        async with aclosing(self._asked.pieces(user)) as pieces:
            async for token, _ in pieces:
                self._last = time.monotonic()
                if self._asked.counter.num_new_tokens == 1:
                    self._first = self._last
                self._has_new_line |= "\n" in token.text
                yield token

    def _ending(self, content: str, ids: list[int]) -> dict[str, Any]:
        asked, counter = self._asked, self._asked.counter
        stop = asked.stop
        is_cut = asked.finish_reason is FinishReason.LENGTH
        limit = self._body.max_tokens if self._body.n_predict is None else self._body.n_predict
        settings = {name: getattr(self._body, name) for name in _SETTINGS}
        return {
            "index": self._index,
            "content": content,
            "tokens": ids,
            "id_slot": -1,
            "stop": True,
            "model": asked.entry.name,
            "tokens_predicted": counter.num_new_tokens,
            "tokens_evaluated": counter.num_prompt_tokens,
            "tokens_cached": counter.num_cached_tokens,
            "generation_settings": {
                **settings,
                "n_predict": -1 if limit is None else limit,
                "temperature": asked.temperature,
                "logit_bias": [
                    {"token": int(token), "bias": bias}
                    for token, bias in (asked.body.logit_bias or {}).items()
                ],
            },
            "prompt": asked.text.decode(asked.prompt),
            "has_new_line": self._has_new_line,
            "truncated": False,
            "stop_type": "limit" if is_cut else "eos" if stop is None else "word",
            "stopping_word": stop or "",
            "timings": self._timings(),
        }

    def _chosen(self, whole: dict[str, Any]) -> dict[str, Any]:
        wanted = self._body.response_fields
        return {name: _within(whole, name) for name in wanted} if wanted else whole

    def _timings(self) -> dict[str, float]:
        """The first token comes of the prompt, so ``predicted`` is of those after it."""
        counter = self._asked.counter
        num_computed = counter.num_prompt_tokens - counter.num_cached_tokens
        num_after = max(0, counter.num_new_tokens - 1)
        return {
            "cache_n": counter.num_cached_tokens,
            **_speed("prompt", num_computed, num_computed, self._first - self._begun),
            **_speed("predicted", counter.num_new_tokens, num_after, self._last - self._first),
        }

    def _likely(self, tokens: list[Token]) -> dict[str, Any]:
        if not self._body.n_probs:
            return {}
        text = self._asked.text
        likely = []
        for token in tokens:
            if token.logprob is None:
                continue
            one = chat_logprob(text, token.id, (token.logprob, token.top_logprobs))
            fields = {"id": token.id, **msgspec.to_builtins(one)}
            for at, top in zip(token.top_logprobs, fields["top_logprobs"], strict=True):
                top["id"] = at[0]
            likely.append(fields)
        return {"completion_probabilities": likely}


def _speed(name: str, num: int, num_timed: int, seconds: float) -> dict[str, float]:
    milliseconds = 1000 * seconds
    return {
        f"{name}_n": num,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / num_timed if num_timed else 0.0,
        f"{name}_per_second": num_timed / seconds if num_timed and seconds else 0.0,
    }


def _within(whole: dict[str, Any], path: str) -> Any:  # noqa: ANN401 - of any JSON
    """What is at ``path``, as in ``timings/prompt_n``; None if nothing is."""
    value: Any = whole
    for name in path.split("/"):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _json(value: Any) -> Response:  # noqa: ANN401
    return Response(msgspec.json.encode(value), media_type="application/json")

"""``/v1/completions``: text and tokens continued."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import ClassVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Likely, Token
from expertd_inference.server.api.continuing import Counter, Usage, interleaved, read_all
from expertd_inference.server.api.errors import ApiError, unsupported
from expertd_inference.server.api.logprobs import (
    CompletionLogprobs,
    PromptLogprobs,
    completion_logprobs,
    prompt_logprobs,
)
from expertd_inference.server.api.requests import read_body, unless_gone
from expertd_inference.server.api.sampling_fields import SamplingFields
from expertd_inference.server.api.sse import DONE, event, stream_events
from expertd_inference.server.chat.gaps import gap
from expertd_inference.server.front import Front, front_of, new_id, now, user_of
from expertd_inference.server.hosting.catalog import Entry
from expertd_inference.server.hosting.model_text import ModelText

DEFAULT_TOKENS = 16
"""OpenAI's."""
MAX_PROMPTS = 1024
FINGERPRINT = "b1-expertd"


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of a request."""

    names: ClassVar = {"messages": "prompt"}
    prompt: str | list[str | int | list[int]] | None = None
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class Choice(msgspec.Struct):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    stop_reason: int | str | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Answer(msgspec.Struct):
    """All continuations, or a piece of one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    system_fingerprint: str = FINGERPRINT


async def complete(request: Request) -> Response:
    """The route."""
    front = front_of(request)
    body = await read_body(request, CompletionRequest, front.say)
    completion = await _completion(front, body)
    user = user_of(request)
    if body.stream:
        return await stream_events(completion.events(user))
    answer = await unless_gone(request, completion.answer(user))
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _completion(front: Front, body: CompletionRequest) -> "_Completion":
    entry, text = await front.model(body.model)
    body.fill(entry.variant)
    return await front.aside(lambda: _Completion(entry, text, body, _prompts(body, text)))


def _prompts(body: CompletionRequest, text: ModelText) -> list[list[int]]:
    asked = body.prompt
    if asked is None:
        raise ApiError(400, "prompt is missing; give a text, tokens, or a list.", param="prompt")
    if body.suffix:
        if not isinstance(asked, str) or body.echo:
            raise unsupported("suffix", "needs a prompt of one text, and no echo.")
        asked = gap(text, asked, body.suffix)
    if isinstance(asked, str):
        return [body.cut(text.encode(asked, special=body.add_special_tokens))]
    tokens = [one for one in asked if isinstance(one, int)]
    if tokens:
        if len(tokens) < len(asked):
            raise ApiError(400, "prompt mixes tokens and texts; give one kind.", param="prompt")
        return [body.cut(tokens)]
    if not 1 <= len(asked) <= MAX_PROMPTS:
        raise ApiError(
            400, f"prompt is a list of {len(asked)}; give 1 to {MAX_PROMPTS}.", param="prompt"
        )
    return [
        body.cut(
            text.encode(one, special=body.add_special_tokens)
            if isinstance(one, str)
            else cast("list[int]", one)
        )
        for one in asked
    ]


class _Completion:
    """One request: each prompt continued as often as it asks for."""

    def __init__(
        self, entry: Entry, text: ModelText, body: CompletionRequest, prompts: list[list[int]]
    ) -> None:
        self._entry = entry
        self._text = text
        self._body = body
        self._prompts = prompts
        self._num_choices = body.num_choices
        self._id = new_id("cmpl-")
        self._created = now()
        asked = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        # Of an echo alone nothing is wanted but the prompt; one token comes with what it tells.
        self._echoes_only = body.echo and asked == 0
        settings = body.settings(text, asked or int(body.echo), body.logprobs)
        settings = replace(settings, prompt_only=self._echoes_only)
        if body.echo and body.logprobs is not None:
            most = max(body.logprobs, body.prompt_logprobs or 0)
            settings = replace(settings, prompt_logprobs=most)
        self._settings = settings
        self._counter = Counter(prompts)

    def _begin(self, user: str) -> list[TokenStream]:
        return [
            self._entry.submit(prompt, self._settings, self._body.origin(user, number))
            for prompt in self._prompts
            for number in range(self._num_choices)
        ]

    async def answer(self, user: str) -> Answer:
        """All at once."""
        choices = []
        for index, tokens in enumerate(await read_all(self._begin(user))):
            for token in tokens:
                self._count(token)
            choices.append(self._choice(index, tokens))
        return self._answer(choices, self._counter.usage)

    async def events(self, user: str) -> AsyncGenerator[bytes]:
        """A token each."""
        wanted = self._body.usage
        usage: Usage | msgspec.UnsetType | None = None if wanted.include_usage else msgspec.UNSET
        streams = self._begin(user)
        begun: set[int] = set()
        async with aclosing(interleaved(streams)) as tokens:
            async for index, token in tokens:
                self._count(token)
                if wanted.continuous_usage_stats:
                    usage = self._counter.usage
                choice = self._choice(index, [token], whole=index not in begun)
                begun.add(index)
                yield event(self._answer([choice], usage))
        if wanted.include_usage:
            yield event(self._answer([], self._counter.usage))
        yield DONE

    def _count(self, token: Token) -> None:
        self._counter.count(token)
        if self._echoes_only:
            self._counter.num_new_tokens = 0

    def _answer(
        self, choices: list[Choice], usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    ) -> Answer:
        return Answer(self._id, "text_completion", self._created, self._entry.name, choices, usage)

    def _choice(self, index: int, tokens: list[Token], *, whole: bool = True) -> Choice:
        """Of a whole continuation, or of a piece, the first of which has the echo as well."""
        prompt = self._prompts[index // self._num_choices]
        new = [] if self._echoes_only else tokens
        text = "".join(token.text for token in new)
        reason = tokens[-1].finish_reason
        ids = [token.id for token in new]
        likelies: list[Likely | None] = [
            None if token.logprob is None else (token.logprob, token.top_logprobs) for token in new
        ]
        opening = tokens[0].opening
        known = None if opening is None else opening.prompt_logprobs
        if whole and self._body.echo:
            text = self._text.decode(prompt, skip_special=self._body.skip_special_tokens) + text
            ids = prompt + ids
            num = self._body.logprobs or 0
            echoed: list[Likely | None] = [(value, top[:num]) for value, top in known or ()]
            likelies = [None, *(echoed or [None] * (len(prompt) - 1)), *likelies]
        choice = Choice(
            index,
            text,
            completion_logprobs(self._text, ids, likelies)
            if self._body.logprobs is not None
            else None,
            ("length" if self._echoes_only else reason.value) if reason is not None else None,
            ids if self._body.return_token_ids else msgspec.UNSET,
            self._body.stop_of(tokens[-1]),
        )
        if whole and self._body.return_token_ids:
            choice.prompt_token_ids = prompt
        if known is not None and (num_top := self._body.prompt_logprobs) is not None:
            choice.prompt_logprobs = prompt_logprobs(self._text, prompt, known, num_top)
        return choice

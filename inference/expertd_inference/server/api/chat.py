"""``/v1/chat/completions``: the next message of a chat."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.server.api.chat_answer import (
    ChatAnswer,
    ChatChoice,
    ChunkChoice,
    Delta,
    delta_of,
    message_of,
)
from expertd_inference.server.api.continuing import Counter, Usage, interleaved, read_all
from expertd_inference.server.api.errors import ApiError, unsupported
from expertd_inference.server.api.logprobs import (
    ChatLogprobs,
    PromptLogprobs,
    chat_logprob,
    prompt_logprobs,
)
from expertd_inference.server.api.requests import read_body, unless_gone
from expertd_inference.server.api.sampling_fields import NO_LIMIT, SamplingFields
from expertd_inference.server.api.sse import DONE, event, stream_events
from expertd_inference.server.chat.answer import AnswerReader, Piece
from expertd_inference.server.chat.prompt import Chat, prompt_of
from expertd_inference.server.front import front_of, new_id, now, user_of
from expertd_inference.server.hosting.catalog import Entry
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.server.variants import Variant


class ChatRequest(SamplingFields, kw_only=True):
    """The body of a request."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool = False
    modalities: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """What the client called fields of which there are two."""
        given = self.max_completion_tokens is not None
        limit = "max_completion_tokens" if given else "max_tokens"
        return {"max_tokens": limit, "logprobs": "top_logprobs"}

    @property
    def most_tokens(self) -> int | None:
        """How many may come; None for what there is room for."""
        most = self.max_completion_tokens
        return self.max_tokens if most is None else most

    def fill(self, variant: Variant) -> None:
        """Gives what is not given the variant's values."""
        SamplingFields.fill(self, variant)
        arguments = {**variant.chat_template_kwargs}
        if self.reasoning_effort is None:
            self.reasoning_effort = variant.reasoning_effort
        else:
            # A request that says how much to think says whether to.
            for name in ("reasoning_effort", "enable_thinking"):
                arguments.pop(name, None)
        self.chat_template_kwargs = {**arguments, **(self.chat_template_kwargs or {})}
        roles = {message.get("role") for message in self.messages}
        if variant.system is not None and self.messages and not roles & {"system", "developer"}:
            system = {"role": "system", "content": variant.system}
            self.messages = [system, *self.messages]


async def chat(request: Request) -> Response:
    """The route."""
    front = front_of(request)
    body = await read_body(request, ChatRequest, front.say)
    front.check_template(body.chat_template)
    entry, text = await front.model(body.model)
    body.fill(entry.variant)
    answering = await front.aside(lambda: _Chat(entry, text, body))
    user = user_of(request)
    if body.stream:
        return await stream_events(answering.events(user))
    answer = await unless_gone(request, answering.answer(user))
    return Response(msgspec.json.encode(answer), media_type="application/json")


def chat_of(body: ChatRequest) -> Chat:
    """The chat in a request. Raises ApiError."""
    if body.modalities and set(body.modalities) - {"text"}:
        raise unsupported("modalities", "may only be text.")
    for name in ("functions", "function_call"):
        if getattr(body, name) is not None:
            raise unsupported(name, "is the old form of tools; send tools and tool_choice.")
    return Chat(
        messages=body.messages,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        documents=body.documents,
        arguments=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
    )


class _Chat:
    """One request."""

    def __init__(self, entry: Entry, text: ModelText, body: ChatRequest) -> None:
        self._entry = entry
        self._text = text
        self._body = body
        self._num_choices = body.num_choices
        self._id = new_id("chatcmpl-")
        self._created = now()
        if body.echo:
            raise unsupported("echo", "is not supported for chats.")
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        self._chat = prompt_of(text, chat_of(body))
        self._prompt = body.cut(self._chat.tokens, self._chat.images)
        most = body.most_tokens
        self._asked = body.settings(
            text,
            NO_LIMIT if most is None else most,
            body.top_logprobs or 0 if body.logprobs else None,
        )
        self._settings = self._chat.settings(self._asked)
        self._counter = Counter([self._prompt])

    def _begin(self, user: str) -> list[TokenStream]:
        return [
            self._entry.submit(
                self._prompt,
                self._settings,
                self._body.origin(user, number),
                self._chat.images,
            )
            for number in range(self._num_choices)
        ]

    async def answer(self, user: str) -> ChatAnswer:
        """All at once."""
        choices = []
        continuations = await read_all(self._begin(user))
        for index, tokens in enumerate(continuations):
            reader = self._chat.reader(self._asked)
            pieces = [self._read(reader, token) for token in tokens]
            choices.append(
                ChatChoice(
                    index,
                    message_of(pieces),
                    self._logprobs(tokens),
                    reader.finish_reason,
                    self._ids(tokens),
                    self._body.stop_of(tokens[-1]),
                )
            )
        return ChatAnswer(
            self._id,
            "chat.completion",
            self._created,
            self._entry.name,
            choices,
            self._counter.usage,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=self._prompt_logprobs(continuations[0][0]),
        )

    async def events(self, user: str) -> AsyncGenerator[bytes]:
        """A token each, though it may say nothing that is certain; the first has the role."""
        wanted = self._body.usage
        readers: dict[int, AnswerReader] = {}
        async with aclosing(interleaved(self._begin(user))) as tokens:
            async for index, token in tokens:
                if index not in readers:
                    known = msgspec.UNSET if readers else self._prompt_logprobs(token)
                    ids = msgspec.UNSET if readers else self._prompt_ids
                    readers[index] = self._chat.reader(self._asked)
                    # As OpenAI's, which has no content where only calls may come.
                    content = None if self._chat.tools.required else ""
                    begun = ChunkChoice(index, Delta("assistant", content), None, None)
                    yield event(self._answer([begun], self._usage, ids, known))
                reader = readers[index]
                num_before = reader.num_calls
                piece = self._read(reader, token)
                yield self._chunk(index, delta_of(piece, num_before), token)
                if reader.finish_reason is not None:
                    ending = ChunkChoice(index, Delta(), None, reader.finish_reason)
                    ending.stop_reason = self._body.stop_of(token)
                    yield event(self._answer([ending], self._usage))
        if wanted.include_usage:
            yield event(self._answer([], self._counter.usage))
        yield DONE

    def _read(self, reader: AnswerReader, token: Token) -> Piece:
        num_before = reader.num_reasoning_tokens
        piece = reader.feed(token)
        self._counter.count(token)
        self._counter.num_reasoning_tokens += reader.num_reasoning_tokens - num_before
        return piece

    def _chunk(self, index: int, delta: Delta, token: Token) -> bytes:
        choice = ChunkChoice(index, delta, self._logprobs([token]), None, self._ids([token]))
        return event(self._answer([choice], self._usage))

    @property
    def _usage(self) -> Usage | msgspec.UnsetType | None:
        """Of a piece that is not the last."""
        wanted = self._body.usage
        if wanted.continuous_usage_stats:
            return self._counter.usage
        return None if wanted.include_usage else msgspec.UNSET

    def _answer(
        self,
        choices: list[ChunkChoice],
        usage: Usage | msgspec.UnsetType | None,
        prompt_ids: list[int] | msgspec.UnsetType = msgspec.UNSET,
        known: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatAnswer:
        """A piece of it; the first one has what there is of the prompt."""
        return ChatAnswer(
            self._id,
            "chat.completion.chunk",
            self._created,
            self._entry.name,
            choices,
            usage,
            prompt_token_ids=prompt_ids,
            prompt_logprobs=known,
        )

    @property
    def _prompt_ids(self) -> list[int] | msgspec.UnsetType:
        return self._prompt if self._body.return_token_ids else msgspec.UNSET

    def _prompt_logprobs(self, first: Token) -> PromptLogprobs | msgspec.UnsetType:
        known = None if first.opening is None else first.opening.prompt_logprobs
        num_top = self._body.prompt_logprobs
        if known is None or num_top is None:
            return msgspec.UNSET
        return prompt_logprobs(self._text, self._prompt, known, num_top)

    def _logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(
            [
                chat_logprob(self._text, token.id, (token.logprob, token.top_logprobs))
                for token in tokens
                if token.logprob is not None
            ]
        )

    def _ids(self, tokens: list[Token]) -> list[int] | msgspec.UnsetType:
        return [token.id for token in tokens] if self._body.return_token_ids else msgspec.UNSET

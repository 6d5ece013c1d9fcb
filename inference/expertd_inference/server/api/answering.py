"""One answer to a chat, for interfaces whose requests are translated to OpenAI's."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.api.chat import ChatRequest, chat_of
from expertd_inference.server.api.continuing import Counter
from expertd_inference.server.api.requests import in_form
from expertd_inference.server.api.sampling_fields import NO_LIMIT
from expertd_inference.server.chat.answer import Piece
from expertd_inference.server.chat.gaps import gap
from expertd_inference.server.chat.prompt import ChatPrompt, count_tokens, prompt_of
from expertd_inference.server.front import Front
from expertd_inference.server.hosting.catalog import Entry
from expertd_inference.server.hosting.model_text import ModelText


class Answering:
    """The model's answer to ``body``, while it comes.

    Once :meth:`pieces` has ended, ``finish_reason`` says why, and ``stop`` is the stop string of
    the request that ended it, if one did.
    """

    def __init__(
        self, entry: Entry, text: ModelText, body: ChatRequest, prompt: ChatPrompt | list[int]
    ) -> None:
        """The answer to tokens alone is content as it comes. Raises ApiError, InvalidInputError."""
        self.entry = entry
        self.text = text
        self.body = body
        chat = prompt if isinstance(prompt, ChatPrompt) else None
        self.images = () if chat is None else chat.images
        self.prompt = body.cut(
            prompt.tokens if isinstance(prompt, ChatPrompt) else prompt, self.images
        )
        self.finish_reason: FinishReason | None = None
        self.stop: str | None = None
        self.counter = Counter([self.prompt])
        most = body.most_tokens
        asked = body.settings(
            text,
            NO_LIMIT if most is None else most,
            body.top_logprobs or 0 if body.logprobs else None,
        )
        self._settings = asked if chat is None else chat.settings(asked)
        self._reader = None if chat is None else chat.reader(asked)

    @property
    def num_prompt_tokens(self) -> int:
        """As :func:`.prompt.count_tokens`."""
        return count_tokens(self.prompt, self.images)

    @property
    def temperature(self) -> float:
        """By which tokens are chosen."""
        return self._settings.temperature

    async def pieces(self, user: str) -> AsyncGenerator[tuple[Token, Piece]]:
        """Each token with what it made certain; the sequence is cancelled when this is closed."""
        origin = self.body.origin(user, 0)
        async with self.entry.submit(self.prompt, self._settings, origin, self.images) as stream:
            async for token in stream:
                self.counter.count(token)
                self.finish_reason = token.finish_reason
                if isinstance(token.stop, str) and token.stop in self.body.stops:
                    self.stop = token.stop
                yield token, self._read(token)

    def _read(self, token: Token) -> Piece:
        if self._reader is None:
            return Piece(token.text)
        piece = self._reader.feed(token)
        self.counter.num_reasoning_tokens = self._reader.num_reasoning_tokens
        return piece


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """OpenAI's request of a chat with these fields; None means that one is not given.

    Raises ApiError for values that OpenAI's interface would not take.
    """
    return in_form({name: one for name, one in fields.items() if one is not None}, ChatRequest)


async def answering(front: Front, fields: Mapping[str, Any]) -> Answering:
    """The answer to a chat in OpenAI's fields. Raises ApiError and ExpertdError."""
    body = chat_request(fields)
    entry, text = await front.model(body.model)
    body.fill(entry.variant)
    return await front.aside(lambda: Answering(entry, text, body, prompt_of(text, chat_of(body))))


async def continuing(
    front: Front, prompt: str, fields: Mapping[str, Any], suffix: str | None = None
) -> Answering:
    """As :func:`answering`, but of a text that no template changes, up to ``suffix`` if given."""
    body = chat_request(fields)
    entry, text = await front.model(body.model)
    body.fill(entry.variant)

    def begin() -> Answering:
        whole = gap(text, prompt, suffix) if suffix else prompt
        return Answering(entry, text, body, text.encode(whole))

    return await front.aside(begin)

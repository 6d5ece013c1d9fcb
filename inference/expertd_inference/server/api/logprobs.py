"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Mapping, Sequence

import msgspec

from expertd_inference.engine.token import Likely
from expertd_inference.server.hosting.model_text import ModelText


class TokenLogprob(msgspec.Struct):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TokenLogprob):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """Of the tokens of a chat's answer."""

    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Of the tokens of a completion; ``text_offset`` is where each begins in the text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[Mapping[str, float] | None]


class PromptLogprob(msgspec.Struct):
    """Of one token that may be in a place of a prompt, as vLLM has it.

    ``rank`` is 1 for the likeliest, None for a token that is not among those asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By a prompt's places, of which the first has none, and by tokens."""
LOWEST = -9999.0
"""In place of minus infinity, which JSON does not have; vLLM's number for it."""


def chat_logprob(text: ModelText, token: int, likely: Likely) -> ChatLogprob:
    """Of one token."""
    logprob, top = likely
    one = _one(text, token, logprob)
    tops = [_one(text, at, value) for at, value in top]
    return ChatLogprob(one.token, one.logprob, one.bytes, tops)


def completion_logprobs(
    text: ModelText, tokens: Sequence[int], likelies: Sequence[Likely | None], offset: int = 0
) -> CompletionLogprobs:
    """Of some tokens, of which a prompt's first has none; ``offset`` is where they begin."""
    names = [text.token_text(token) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return CompletionLogprobs(
        offsets,
        [None if likely is None else max(likely[0], LOWEST) for likely in likelies],
        names,
        [
            None if likely is None else _named(text, name, likely)
            for name, likely in zip(names, likelies, strict=True)
        ],
    )


def prompt_logprobs(
    text: ModelText, prompt: Sequence[int], likelies: Sequence[Likely], num: int
) -> PromptLogprobs:
    """Of each token of a prompt, and the ``num`` likeliest in its place."""
    places: PromptLogprobs = [None]
    for token, (logprob, top) in zip(prompt[1:], likelies, strict=True):
        place = {
            str(at): PromptLogprob(max(value, LOWEST), rank, text.token_text(at))
            for rank, (at, value) in enumerate(top[:num], 1)
        }
        own = PromptLogprob(max(logprob, LOWEST), None, text.token_text(token))
        place.setdefault(str(token), own)
        places.append(place)
    return places


def _named(text: ModelText, name: str, likely: Likely) -> dict[str, float]:
    """The likeliest tokens, and the one that came, by their texts; of equal texts the likeliest."""
    logprob, top = likely
    named: dict[str, float] = {}
    for token, value in top:
        named.setdefault(text.token_text(token), max(value, LOWEST))
    named.setdefault(name, max(logprob, LOWEST))
    return named


def _one(text: ModelText, token: int, logprob: float) -> TokenLogprob:
    return TokenLogprob(text.token_text(token), max(logprob, LOWEST), [*text.token_bytes(token)])

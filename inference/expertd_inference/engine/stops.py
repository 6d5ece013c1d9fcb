"""A sequence's text piece by piece, and when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from expertd_inference.settings import GenerationSettings

_INCOMPLETE = "\ufffd"
"""What decoders put for bytes that are no whole character."""


class FinishReason(StrEnum):
    """Why a sequence got no more tokens."""

    STOP = "stop"
    """It came to the end of its text, a stop token or a stop string."""
    LENGTH = "length"
    """It has as many tokens as were asked for, or as there is room for."""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The text that is certain because of a token.

    ``stop`` is the token or the text at which the sequence stopped; None if it goes on, or if its
    length ended it.
    """

    text: str
    finish_reason: FinishReason | None = None
    stop: int | str | None = None


class TokenText:
    """What the tokens of one sequence say, passed on as soon as no later token can change it.

    Text is held back while it ends within a character, or may be the beginning of a stop string.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - transformers is untyped
        settings: GenerationSettings,
        end_tokens: frozenset[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        """``stop`` are the pack's own stop strings, beside those of ``settings``."""
        self._settings = settings
        self._stop_tokens = frozenset(settings.stop_tokens)
        if not settings.ignore_eos:
            self._stop_tokens |= end_tokens
        self._max_new_tokens = max_new_tokens
        self._strings = (*settings.stop, *stop)
        self._decoder = _decoder(tokenizer, skip_special_tokens=settings.skip_special_tokens)
        self._num_tokens = 0
        self._held = ""

    def feed(self, token: int, *, ends: bool = False) -> TextPiece:
        """Takes the next token, and says what it adds and whether it is the last.

        If it ``ends`` the text, whatever else was asked for, it is.
        """
        self._num_tokens += 1
        may_stop = self._num_tokens >= self._settings.min_new_tokens
        stops_here = may_stop and token in self._stop_tokens
        is_last = ends or stops_here or self._num_tokens >= self._max_new_tokens
        self._held += self._decoder.feed(token)
        if is_last:
            self._held += self._decoder.flush()
        if may_stop and (found := self._find()):
            at, string = found
            text = self._held[: at + len(string) if self._settings.include_stop else at]
            return TextPiece(text, FinishReason.STOP, string)
        if is_last:
            reason = FinishReason.STOP if ends or stops_here else FinishReason.LENGTH
            return TextPiece(self._take(0), reason, token if stops_here else None)
        return TextPiece(self._take(self._num_held() if self._strings else 0))

    def _take(self, num_held: int) -> str:
        cut = len(self._held) - num_held
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _find(self) -> tuple[int, str] | None:
        """Where the first stop string begins, and which: of several there the longest."""
        places = [(self._held.find(one), -len(one), one) for one in self._strings]
        at, _, string = min((x for x in places if x[0] >= 0), default=(-1, 0, ""))
        return (at, string) if at >= 0 else None

    def _num_held(self) -> int:
        """How much of the end may be the beginning of a stop string."""
        most = min(len(self._held), max(map(len, self._strings)) - 1)
        for num in range(most, 0, -1):
            if any(string.startswith(self._held[-num:]) for string in self._strings):
                return num
        return 0


class _StreamDecoder:
    """By the tokenizers library, which keeps the few tokens that the next one's text depends on."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._num_chars = 0

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        text: str = self._stream.step(self._tokenizer, token) or ""
        self._num_chars += len(text)
        return text

    def flush(self) -> str:
        """The bytes at the end that make no whole character."""
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skips)
        rest, self._num_chars = text[self._num_chars :], len(text)
        return rest


class _SlowDecoder:
    """For tokenizers that are not of the tokenizers library.

    A token's text depends on its neighbours (spaces, for one), so it is the difference that the
    token makes to the text of the few tokens before it (the method of text-generation-inference's
    ``decode_token``).
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._tokens: list[int] = []
        # The text of tokens[:_passed] has been passed on; _context is where that of the
        # tokens before, which theirs is compared with, begins.
        self._context = 0
        self._passed = 0

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        return self._new_text(at_end=False)

    def flush(self) -> str:
        return self._new_text(at_end=True)

    def _new_text(self, *, at_end: bool) -> str:
        before = self._decode(self._tokens[self._context : self._passed])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not at_end):
            return ""
        self._context, self._passed = self._passed, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skips)
        return text


def _decoder(
    tokenizer: Any,  # noqa: ANN401
    *,
    skip_special_tokens: bool,
) -> _StreamDecoder | _SlowDecoder:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(fast, Tokenizer):
        return _StreamDecoder(fast, skip_special_tokens=skip_special_tokens)
    return _SlowDecoder(tokenizer, skip_special_tokens=skip_special_tokens)

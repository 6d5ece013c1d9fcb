"""An answer as clients want it: reasoning apart from content, and calls of tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.hosting.model_text import ModelText


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants to be called; ``arguments`` are JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Piece:
    """What a token made certain of an answer; all of it may be empty."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerParser:
    """Takes an answer's text as it comes, and says what of it is certain by now."""

    def feed(self, text: str) -> Piece:
        """The next of the text."""
        return Piece(text)

    def finish(self, rest: str = "") -> Piece:
        """The last of the text: nothing is held back any more."""
        return Piece(rest)


class AnswerReader:
    """An :class:`AnswerParser` of a sequence's tokens, which counts and names the end."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self.num_reasoning_tokens = 0
        """How many of the tokens read were reasoning."""
        self.calls: list[ToolCall] = []
        """Those that came."""
        self.finish_reason: str | None = None
        """OpenAI's word for why it ended; None before the last token."""

    def feed(self, token: Token) -> Piece:
        """What the token made certain; the last one, all that was held back."""
        if token.finish_reason is None:
            piece = self._parser.feed(token.text)
        else:
            piece = self._parser.finish(token.text)
        self.calls += piece.calls
        self.num_reasoning_tokens += bool(piece.reasoning)
        if token.finish_reason is not None:
            called = bool(self.calls) and token.finish_reason is FinishReason.STOP
            self.finish_reason = "tool_calls" if called else token.finish_reason.value
        return piece


def answer_parser(
    text: ModelText, prompt: str, tools: Sequence[Mapping[str, Any]] | None
) -> AnswerParser:
    """For the answer to ``prompt``, which may have begun it; without ``tools`` it has no calls."""
    del text, prompt, tools
    return AnswerParser()

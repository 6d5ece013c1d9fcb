"""An answer as clients want it: reasoning apart from content, and calls of tools."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.chat.calls import RawCall
from expertd_inference.server.chat.families import Family
from expertd_inference.server.chat.regions import Closed, Event, Kind, Opened, Region, Scanner, Text
from expertd_inference.server.chat.schemas import ToolSchemas


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
    """Takes an answer's text as it comes, and says what of it is certain by now.

    Spaces around regions are dropped; an answer without any is passed on as it is. A call that
    cannot be read is content, with its markers.
    """

    def __init__(
        self, family: Family, prompt: str = "", tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """``prompt`` is what the answer continues, and may have begun it."""
        self._family = family
        self._schemas = ToolSchemas(tools or ())
        self._scanner = Scanner(family.enabled(tools=bool(tools)))
        self._region: Region | None = None
        """That of the next text."""
        self._spaces = ""
        """At the end of what came: they are passed on if more text follows."""
        self._trims = False
        """Whether spaces at the beginning of the next text are dropped."""
        self._num_of_prompt = 0
        """How many characters come that the prompt has already."""
        self._call_ids: set[str] = set()
        self.is_fresh = True
        """Whether nothing came of reasoning, content or calls, but for their beginning."""
        self._read(self._scanner.feed(_begun(family, prompt)))
        self._spaces = ""
        self._num_of_prompt = self._scanner.num_held

    @property
    def reasoning(self) -> Region | None:
        """The region of what comes next if that is reasoning."""
        is_reasoning = self._region is not None and self._region.kind is Kind.REASONING
        return self._region if is_reasoning else None

    def feed(self, text: str) -> Piece:
        """The next of the text."""
        return self._read(self._scanner.feed(text))

    def finish(self, rest: str = "", *, cut: bool = False) -> Piece:
        """The last of the text: nothing is held back any more.

        Of an answer that was ``cut`` at its length a call without its end is content.
        """
        piece = self._read([*self._scanner.feed(rest), *self._scanner.finish()], cut=cut)
        spaces = "" if self._trims else self._spaces
        return Piece(piece.content + spaces, piece.reasoning, piece.calls)

    def _read(self, events: Iterable[Event], *, cut: bool = False) -> Piece:
        texts: dict[Kind, list[str]] = {Kind.CONTENT: [], Kind.REASONING: []}
        found: list[ToolCall] = []
        for event in events:
            match event:
                case Opened(region):
                    self._region = region
                    self._num_of_prompt = 0
                    if region.kind is not Kind.CALLS:
                        self._spaces, self._trims = "", True
                case Text(text) if self._region is None:
                    self.is_fresh &= text.isspace()
                    text, self._num_of_prompt = (
                        text[self._num_of_prompt :],
                        max(0, self._num_of_prompt - len(text)),
                    )
                    texts[Kind.CONTENT].append(self._trimmed(text))
                case Text(text) if self._region is not None and self._region.kind in texts:
                    texts[self._region.kind].append(self._trimmed(text))
                case Closed(region, body, raw, complete):
                    self._region = None
                    self.is_fresh &= region.kind is Kind.MARK
                    calls = None
                    if region.kind is Kind.CALLS and (complete or not cut):
                        calls = self._calls(body)
                    if region.kind is Kind.CALLS and calls is None:
                        texts[Kind.CONTENT].append(self._trimmed(raw))
                    else:
                        self._spaces, self._trims = "", True
                        found += calls or ()
        return Piece("".join(texts[Kind.CONTENT]), "".join(texts[Kind.REASONING]), tuple(found))

    def _trimmed(self, text: str) -> str:
        """What is to be passed on now that ``text`` came."""
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        whole = self._spaces + text
        passed_on = whole.rstrip()
        self._spaces = whole[len(passed_on) :]
        return passed_on

    def _calls(self, body: str) -> list[ToolCall] | None:
        """Those in a region's body; None if it cannot be read."""
        try:
            return [
                ToolCall(self._id(call), call.name, _json(call.arguments))
                for call in self._family.read(body, self._schemas)
            ]
        except (ValueError, RecursionError):
            return None

    def _id(self, call: RawCall) -> str:
        """Its own, unless another call of the answer has that."""
        id_ = call.id
        if id_ is None or id_ in self._call_ids:
            id_ = self._family.new_id()
        self._call_ids.add(id_)
        return id_


@dataclass
class AnswerReader:
    """An :class:`AnswerParser` of a sequence's tokens, which counts and names the end.

    ``hidden`` are special tokens whose text, which clients do not want, has to be cut off, because
    the engine was told to leave out none. After ``max_calls`` calls no more are passed on.
    """

    parser: AnswerParser
    hidden: Mapping[int, str] = field(default_factory=dict)
    max_calls: int | None = None
    num_calls: int = 0
    """How many came."""
    num_reasoning_tokens: int = 0
    """How many of the tokens read were reasoning."""
    finish_reason: str | None = None
    """OpenAI's word for why it ended; None before the last token."""

    def feed(self, token: Token) -> Piece:
        """What the token made certain; the last one, all that was held back."""
        text = token.text.removesuffix(self.hidden.get(token.id, ""))
        before = self.parser.reasoning
        if token.finish_reason is None:
            piece = self.parser.feed(text)
        else:
            piece = self.parser.finish(text, cut=token.finish_reason is FinishReason.LENGTH)
        self.num_reasoning_tokens += bool(before or self.parser.reasoning or piece.reasoning)
        calls = piece.calls
        if self.max_calls is not None:
            calls = calls[: max(0, self.max_calls - self.num_calls)]
        self.num_calls += len(calls)
        if token.finish_reason is not None:
            called = bool(self.num_calls) and token.finish_reason is FinishReason.STOP
            self.finish_reason = "tool_calls" if called else token.finish_reason.value
        return Piece(piece.content, piece.reasoning, calls)


def _begun(family: Family, prompt: str) -> str:
    """What of the answer is in the prompt already, as much as its regions need."""
    found = max(((prompt.rfind(one), one) for one in family.anchors), default=(-1, ""))
    at, anchor = found
    if at >= 0:
        return prompt[at if anchor in family.markers(tools=True) else at + len(anchor) :]
    end = prompt.rstrip()
    for region in family.regions:
        if region.kind is Kind.REASONING and end.endswith(region.opens):
            return next(one for one in region.opens if end.endswith(one))
    return ""


def _json(arguments: Mapping[str, Any]) -> str:
    """Raises ValueError for infinities, which JSON does not have."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # Half a character can be sent as its escape only.
        return json.dumps(arguments, allow_nan=False)
    return text

"""An answer to a chat, whole and in pieces, as OpenAI has it."""

from collections.abc import Sequence

import msgspec

from expertd_inference.server.api.continuing import Usage
from expertd_inference.server.api.logprobs import ChatLogprobs, PromptLogprobs
from expertd_inference.server.chat.answer import Piece


class CalledFunction(msgspec.Struct):
    """Which function to call, and with what: JSON."""

    name: str
    arguments: str


class MessageCall(msgspec.Struct):
    """A tool to call."""

    id: str
    function: CalledFunction
    type: str = "function"


class DeltaCall(msgspec.Struct):
    """The same in a stream; ``index`` counts the calls of an answer."""

    index: int
    id: str
    function: CalledFunction
    type: str = "function"


class AnswerMessage(msgspec.Struct):
    """What the model says; reasoning has both of the names that clients know."""

    role: str
    content: str | None
    refusal: str | None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[MessageCall] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    """A piece of it."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaCall] | None = None


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    stop_reason: int | str | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    stop_reason: int | str | msgspec.UnsetType = msgspec.UNSET


class ChatAnswer(msgspec.Struct):
    """All answers, or a piece of one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice] | list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    system_fingerprint: str = "b1-expertd"
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


def message_of(pieces: Sequence[Piece]) -> AnswerMessage:
    """All of an answer."""
    content = "".join(piece.content for piece in pieces)
    reasoning = "".join(piece.reasoning for piece in pieces) or msgspec.UNSET
    calls = [
        MessageCall(call.id, CalledFunction(call.name, call.arguments))
        for piece in pieces
        for call in piece.calls
    ]
    return AnswerMessage(
        "assistant",
        content or (None if calls else ""),
        reasoning_content=reasoning,
        reasoning=reasoning,
        tool_calls=calls or msgspec.UNSET,
    )


def delta_of(piece: Piece, num_calls: int) -> Delta:
    """What a token gave, which may be nothing; ``num_calls`` came before it."""
    calls = [
        DeltaCall(index, call.id, CalledFunction(call.name, call.arguments))
        for index, call in enumerate(piece.calls, num_calls)
    ]
    reasoning = piece.reasoning or None
    return Delta(
        content=piece.content or None,
        reasoning_content=reasoning,
        reasoning=reasoning,
        tool_calls=calls or None,
    )

"""A grammar by which a model calls tools, in its family's form and with valid arguments."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from expertd_inference.grammar import GrammarKind, GrammarSpec, pattern_of


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a call of one tool is written: ``opening``, its arguments, ``closing``.

    ``schema`` is the JSON schema of the arguments. ``opening`` and ``closing`` may have special
    tokens.
    """

    opening: str
    schema: Mapping[str, Any] | bool
    closing: str


def grammar_of_calls(
    forms: Sequence[CallForm],
    special_tokens: Mapping[str, int],
    *,
    before: str = "",
    between: str | None = None,
    after: str = "",
    reasoning_end: str | None = None,
) -> GrammarSpec:
    """Calls of some of these tools, one at least: only one unless there is a ``between``.

    ``before`` and ``after`` are around all calls. ``special_tokens`` are those of the tokenizer, by
    their text: where one stands in these texts the token comes and not its letters. With a
    ``reasoning_end`` any text that this one ends may come first.
    """
    calls = "call" if between is None else f"call ({_spelled(between, special_tokens)} call)*"
    start = [_spelled(before, special_tokens), calls, _spelled(after, special_tokens)]
    lines = []
    if reasoning_end is not None:
        start.insert(0, "reasoning")
        lines += _reasoning(reasoning_end, special_tokens)
    for number, form in enumerate(forms):
        arguments = msgspec.json.encode(form.schema).decode()
        opening, closing = (_spelled(one, special_tokens) for one in (form.opening, form.closing))
        lines.append(f"call_{number}: {opening} %json {arguments} {closing}")
    choices = " | ".join(f"call_{number}" for number in range(len(forms)))
    head = ["%llguidance {}", f"start: {' '.join(start)}", f"call: {choices}"]
    return GrammarSpec(GrammarKind.LARK, "\n".join([*head, *lines]))


def _reasoning(end: str, special_tokens: Mapping[str, int]) -> list[str]:
    if end in special_tokens:
        return [f"reasoning: REASONED <[{special_tokens[end]}]>", r"REASONED: /(.|\n)*/"]
    return [rf"reasoning[lazy]: /(.|\n)*{pattern_of(end)}/"]


def _spelled(text: str, special_tokens: Mapping[str, int]) -> str:
    """Of a text in Lark: its special tokens, and the text between them."""
    longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
    pieces = (
        re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]
    )
    return " ".join(
        f"<[{special_tokens[piece]}]>" if piece in special_tokens else f"/{pattern_of(piece)}/"
        for piece in pieces
        if piece
    )

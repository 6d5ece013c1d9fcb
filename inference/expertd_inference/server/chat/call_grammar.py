"""Grammars in a family's form: calls of tools with valid arguments, and what follows reasoning."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from expertd_inference.grammar import GrammarKind, GrammarSpec, pattern_of

SpecialTokens = Mapping[str, int]
"""Those of a tokenizer, by their text: where one stands in a form the token comes, not letters."""
_ANY = r"/(.|\n)*/"


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a call of one tool is written: ``opening``, its arguments as JSON, ``closing``.

    ``schema`` is the JSON schema of the arguments.
    """

    opening: str
    schema: Mapping[str, Any] | bool
    closing: str

    def rules(self, name: str, special_tokens: SpecialTokens) -> Iterator[str]:
        """Lark's rule ``name``, and what it needs."""
        yield (
            f"{name}: {_spelled(self.opening, special_tokens)} %json {_json(self.schema)} "
            f"{_spelled(self.closing, special_tokens)}"
        )


@dataclass(frozen=True, kw_only=True)
class TaggedForm:
    """How a call of one tool is written whose arguments stand between tags of their own.

    Each is ``argument_opening``, in which KEY stands for its name, its value, and
    ``argument_closing``. They come in the order of the schema's properties; only required ones
    have to. A value that may be a string is any text, or one of an ``enum``; others are JSON.
    """

    opening: str
    argument_opening: str
    argument_closing: str
    schema: Mapping[str, Any]
    closing: str

    def rules(self, name: str, special_tokens: SpecialTokens) -> Iterator[str]:
        """Lark's rule ``name``, and what it needs."""
        required = self.schema.get("required", ())
        parts = [_spelled(self.opening, special_tokens)]
        for number, (key, schema) in enumerate(self.schema.get("properties", {}).items()):
            argument = f"{name}_{number}"
            parts.append(argument if key in required else f"{argument}?")
            opening = _spelled(self.argument_opening.replace("KEY", key), special_tokens)
            closing = _spelled(self.argument_closing, special_tokens)
            choices = schema.get("enum") if isinstance(schema, Mapping) else None
            if choices and all(isinstance(one, str) for one in choices):
                value = f"/{'|'.join(map(pattern_of, choices))}/ {closing}"
            elif _may_be_text(schema):
                value = f"{argument}_text"
                yield _any_until(value, self.argument_closing, special_tokens)
            else:
                defined = {key: self.schema[key] for key in ("$defs",) if key in self.schema}
                value = f"%json {_json({**schema, **defined})} {closing}"
            yield f"{argument}: {opening} {value}"
        parts.append(_spelled(self.closing, special_tokens))
        yield f"{name}: {' '.join(parts)}"


def grammar_of_calls(
    forms: Sequence[CallForm | TaggedForm],
    special_tokens: SpecialTokens,
    *,
    before: str = "",
    between: str | None = None,
    after: str = "",
) -> GrammarSpec:
    """Calls of some of these tools, one at least: only one unless there is a ``between``.

    ``before`` and ``after`` are around all calls.
    """
    calls = "call" if between is None else f"call ({_spelled(between, special_tokens)} call)*"
    around = [_spelled(one, special_tokens) for one in (before, after)]
    names = [f"call_{number}" for number in range(len(forms))]
    lines = [
        "%llguidance {}",
        f"start: {around[0]} {calls} {around[1]}",
        f"call: {' | '.join(names)}",
    ]
    for name, form in zip(names, forms, strict=True):
        lines += form.rules(name, special_tokens)
    return GrammarSpec(GrammarKind.LARK, "\n".join(lines))


def after_reasoning(spec: GrammarSpec, end: str, special_tokens: SpecialTokens) -> GrammarSpec:
    """As ``spec``, after any text that ``end`` ends."""
    return replace(spec, opening=_any_until("opening", end, special_tokens))


def _any_until(name: str, end: str, special_tokens: SpecialTokens) -> str:
    """Lark's rule ``name``: any text, and ``end``, which does not stand in it."""
    pieces = _pieces(end, special_tokens)
    special = [at for at, piece in enumerate(pieces) if piece in special_tokens]
    if not special:
        return rf"{name}[lazy]: /(.|\n)*{pattern_of(end)}/"
    # No text has a special token, and what of the end stands before it is any text as well.
    return f"{name}: {_ANY} {_spelled(''.join(pieces[special[0] :]), special_tokens)}"


def _may_be_text(schema: Any) -> bool:  # noqa: ANN401 - of a JSON schema
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind is None or "string" in ([kind] if isinstance(kind, str) else kind)


def _spelled(text: str, special_tokens: SpecialTokens) -> str:
    """A text in Lark."""
    return " ".join(
        f"<[{special_tokens[piece]}]>" if piece in special_tokens else f"/{pattern_of(piece)}/"
        for piece in _pieces(text, special_tokens)
    )


def _pieces(text: str, special_tokens: SpecialTokens) -> list[str]:
    """Special tokens, and the texts between them."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    separators = "|".join(re.escape(one) for one in longest_first if one)
    return [
        piece for piece in (re.split(f"({separators})", text) if separators else [text]) if piece
    ]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()

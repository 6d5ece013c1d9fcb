"""Calls of tools as rules of a grammar, in a family's form and with valid arguments."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from expertd_inference.grammar import JSON_OPTIONS, pattern_of
from expertd_inference.server.chat.schemas import DEFINITIONS, takes_text

SpecialTokens = Mapping[str, int]
"""Those of a tokenizer, by their text: where one stands in a form the token comes, not letters."""
_NUMBER = "/[0-9]{1,3}/"


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a call of one tool is written: ``opening``, its arguments as JSON, ``closing``.

    ``schema`` is the JSON schema of the arguments. Unless it is None, a number stands after the
    opening, and ``after_number`` behind it.
    """

    opening: str
    schema: Mapping[str, Any] | bool
    closing: str
    after_number: str | None = None

    def rules(self, name: str, special_tokens: SpecialTokens, lead: str = "") -> Iterator[str]:
        """Lark's rule ``name``, and what it needs, without the ``lead`` of its opening."""
        parts = [spelled(self.opening.removeprefix(lead), special_tokens)]
        if self.after_number is not None:
            parts += [_NUMBER, spelled(self.after_number, special_tokens)]
        parts += [_json_of(self.schema), spelled(self.closing, special_tokens)]
        yield f"{name}: {' '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class TaggedForm:
    """How a call of one tool is written whose arguments stand between tags of their own.

    Each is ``argument_opening``, in which KEY stands for its name and IS_TEXT for true or false,
    its value, and ``argument_closing``. They come in the order of the schema's properties; only
    required ones have to. A value that may be a string is any text without one of ``tags``, or one
    of an ``enum``; others are JSON.
    """

    opening: str
    argument_opening: str
    argument_closing: str
    schema: Mapping[str, Any]
    closing: str
    tags: tuple[str, ...]

    def rules(self, name: str, special_tokens: SpecialTokens, lead: str = "") -> Iterator[str]:
        """Lark's rule ``name``, and what it needs, without the ``lead`` of its opening."""
        required = self.schema.get("required", ())
        parts = [spelled(self.opening.removeprefix(lead), special_tokens)]
        for number, (key, schema) in enumerate(self.schema.get("properties", {}).items()):
            argument = f"{name}_{number}"
            parts.append(argument if key in required else f"{argument}?")
            closing = spelled(self.argument_closing, special_tokens)
            choices = schema.get("enum") if isinstance(schema, Mapping) else None
            is_text = takes_text(schema, self.schema)
            if choices and all(isinstance(one, str) for one in choices):
                value = f"/{'|'.join(map(pattern_of, choices))}/ {closing}"
            elif is_text:
                text = f"{argument}_text".upper()
                tags = "|".join(map(pattern_of, self.tags))
                until, rest = at_special(self.argument_closing, special_tokens)
                ending = f"/{pattern_of(until)}/" if until else ""
                yield rf"{text}: (/(.|\n)*/ & ~/(.|\n)*({tags})(.|\n)*/) {ending}"
                value = f"{text} {spelled(rest, special_tokens)}"
            else:
                defined = {key: self.schema[key] for key in DEFINITIONS if key in self.schema}
                value = f"{_json_of({**schema, **defined})} {closing}"
            said = self.argument_opening.replace("KEY", key).replace("IS_TEXT", _json(is_text))
            yield f"{argument}: {spelled(said, special_tokens)} {value}"
        parts.append(spelled(self.closing, special_tokens))
        yield f"{name}: {' '.join(parts)}"


def rules_of_calls(
    forms: Sequence[CallForm | TaggedForm],
    special_tokens: SpecialTokens,
    *,
    before: str = "",
    between: str | None = None,
    after: str = "",
    lead: str = "",
) -> list[str]:
    """Lark's rule ``calls``: some of these tools, one at least; one only without a ``between``.

    ``before`` and ``after`` are around all calls. The ``lead`` of what comes first is left out.
    """
    around = [spelled(one, special_tokens) for one in (before.removeprefix(lead), after)]
    names = [f"call_{number}" for number in range(len(forms))]
    several = "" if between is None else f"({spelled(between, special_tokens)} call)*"
    lines = [f"calls: {around[0]} call {several} {around[1]}", f"call: {' | '.join(names)}"]
    for name, form in zip(names, forms, strict=True):
        lines += form.rules(name, special_tokens, "" if before else lead)
    return lines


def any_until(name: str, end: str, special_tokens: SpecialTokens) -> str:
    """Lark's rule ``name``: any text, and ``end``, which does not stand in it."""
    _, rest = at_special(end, special_tokens)
    if not rest:
        return rf"{name}[lazy]: /(.|\n)*{pattern_of(end)}/"
    # No text has a special token, and what of the end stands before it is any text as well.
    return rf"{name}: /(.|\n)*/ {spelled(rest, special_tokens)}"


def spelled(text: str, special_tokens: SpecialTokens) -> str:
    """A text in Lark."""
    return " ".join(
        f"<[{special_tokens[piece]}]>" if piece in special_tokens else f"/{pattern_of(piece)}/"
        for piece in pieces_of(text, special_tokens)
    )


def at_special(text: str, special_tokens: SpecialTokens) -> tuple[str, str]:
    """What stands before the first special token, and all from there on."""
    pieces = pieces_of(text, special_tokens)
    at = next((at for at, one in enumerate(pieces) if one in special_tokens), len(pieces))
    return "".join(pieces[:at]), "".join(pieces[at:])


def pieces_of(text: str, special_tokens: SpecialTokens) -> list[str]:
    """Special tokens, and the texts between them."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    separators = "|".join(re.escape(one) for one in longest_first if one)
    return [
        piece for piece in (re.split(f"({separators})", text) if separators else [text]) if piece
    ]


def _json_of(schema: Mapping[str, Any] | bool) -> str:
    if isinstance(schema, Mapping):
        schema = {"x-guidance": JSON_OPTIONS, **schema}
    return f"%json {_json(schema)}"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()

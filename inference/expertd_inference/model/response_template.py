"""A tokenizer's own description of its model's answers, as transformers has them; needs no torch.

``response_template`` of a tokenizer names fields of an answer, such as ``reasoning_content`` and
``tool_calls``, each with what opens and closes it, texts or regular expressions, and how its body
becomes a value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TemplateField:
    """One field. It has no ``opens`` if it is what stands outside of all others.

    ``read`` is the value of a body between two of the markers. Raises ValueError for a body that
    is none.
    """

    name: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    read: Callable[[str], Any]
    has_types: bool
    """Whether its texts are texts: in tags a number is one, too."""
    is_json: bool
    """Whether it is nothing but JSON."""


@dataclass(frozen=True)
class AnswerTemplate:
    """All fields, and after which texts an answer begins."""

    fields: tuple[TemplateField, ...]
    anchors: tuple[str, ...]


def answer_template(described: Mapping[str, Any]) -> AnswerTemplate:
    """Of a tokenizer's ``response_template``.

    Raises ValueError for one that is none, or whose markers do not begin or end with a text of
    their own.
    """
    from transformers.utils.chat_parsing.response_templates import load_response_template

    loaded = load_response_template(dict(described))
    fields = tuple(_field(field) for field in loaded.fields.values())
    return AnswerTemplate(fields, tuple(loaded.start_anchor_literals or ()))


def _field(field: Any) -> TemplateField:  # noqa: ANN401 - transformers is untyped
    from transformers.utils.chat_parsing.content_parsers import process_field

    opens = _markers(field.open_re, field.open_literals, at_end=False)
    # What is outside of all others ends at tokens that are no text.
    closes_it = field.close_re if opens or field.close_literals else None
    closes = _markers(closes_it, field.close_literals, at_end=True)

    def read(body: str) -> Any:  # noqa: ANN401 - of any JSON
        captures: dict[str, str] = {}
        if field.close_re is not None and field.close_literals is None:
            whole = body + closes[0]
            ends = [
                one.start() for one in field.close_re.finditer(whole) if one.end() == len(whole)
            ]
            body = whole[: ends[0]] if ends else body
        if field.open_re is not None and field.open_literals is None:
            opened = field.open_re.match(opens[0] + body)
            if opened is None:
                raise ValueError(f"what opens {field.name} is not complete")
            captures = {name: text for name, text in opened.groupdict().items() if text is not None}
            body = (opens[0] + body)[opened.end() :]
        try:
            return process_field(body, field, captures)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{field.name} cannot be read: {error}") from error

    typed = field.content not in ("xml-inline", "kv-lines")
    return TemplateField(field.name, opens, closes, read, typed, field.content == "json")


def _markers(pattern: Any, literals: list[str] | None, *, at_end: bool) -> tuple[str, ...]:  # noqa: ANN401
    """The texts to look for: all of a marker, or that part of a regular expression which is one."""
    if pattern is None:
        return ()
    if literals is not None:
        return tuple(literals)
    items = _items(pattern.pattern.removeprefix(r"\s*"))
    if at_end:
        items.reverse()
    text = ""
    for item in items:
        if item is None:
            break
        text = item + text if at_end else text + item
    if len(text) < 2:
        raise ValueError(f"{pattern.pattern!r} has no text of its own to look for")
    return (text,)


def _items(pattern: str) -> list[str | None]:
    """The characters of a regular expression, None for what may be several."""
    items: list[str | None] = []
    at = 0
    while at < len(pattern):
        one = pattern[at]
        if one == "\\" and at + 1 < len(pattern):
            escaped = pattern[at + 1]
            items.append("\n" if escaped == "n" else None if escaped.isalnum() else escaped)
            at += 2
        elif one in "([":
            at = _end_of_group(pattern, at)
            items.append(None)
        elif one == "|":
            return [None]
        elif one in ".^$":
            items.append(None)
            at += 1
        elif one in "*+?{":
            # Even one of what is repeated is uncertain.
            items[-1:] = [None]
            at = at + 1 if one != "{" else pattern.find("}", at) + 1 or len(pattern)
        else:
            items.append(one)
            at += 1
    return items


def _end_of_group(pattern: str, at: int) -> int:
    closing = {"(": ")", "[": "]"}[pattern[at]]
    depth = 0
    while at < len(pattern):
        one = pattern[at]
        if one == "\\":
            at += 1
        elif one == "[" and closing == ")":
            at = _end_of_group(pattern, at) - 1
        elif one == "(" and closing == ")":
            depth += 1
        elif one == closing:
            depth -= 1
            if depth <= 0:
                return at + 1
        at += 1
    return at

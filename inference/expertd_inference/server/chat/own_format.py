"""The format that a tokenizer describes itself, as a family of its own."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expertd_inference.model.response_template import TemplateField, answer_template
from expertd_inference.server.chat.calls import RawCall
from expertd_inference.server.chat.families import Family
from expertd_inference.server.chat.regions import Kind, Region
from expertd_inference.server.chat.schemas import ToolSchemas

NAME = "own"
_REASONING = {"reasoning_content", "reasoning", "thinking"}


def family_described(described: Mapping[str, Any]) -> Family | None:
    """None if the description cannot be used."""
    try:
        template = answer_template(described)
    except (ValueError, TypeError):
        return None
    regions: list[Region] = []
    calls: TemplateField | None = None
    for field in template.fields:
        if field.name in _REASONING and field.opens:
            regions.append(Region(Kind.REASONING, field.opens, field.closes))
        elif field.name == "tool_calls" and field.opens:
            calls = field
            is_json = field.is_json
            regions.append(
                Region(Kind.CALLS, field.opens, field.closes, of_tools=True, in_json=is_json)
            )
        elif field.name == "content":
            marks = (*field.opens, *field.closes)
            regions += [Region(Kind.MARK, marks)] if marks else []

    def read(body: str, schemas: ToolSchemas) -> Sequence[RawCall]:
        assert calls is not None
        value = calls.read(body)
        found = value if isinstance(value, list) else [value]
        return [_call(one, None if calls.has_types else schemas) for one in found]

    return Family(
        NAME, tuple(regions), read, anchors=template.anchors, inside=tuple(_texts(described))
    )


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - of any JSON
    """All that a description has."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _call(value: Any, schemas: ToolSchemas | None) -> RawCall:  # noqa: ANN401 - of any JSON
    """``schemas`` are for arguments that have no types of their own."""
    match value:
        case {"function": {"name": str(name), **function}} if name:
            arguments = function.get("arguments") or {}
            if not isinstance(arguments, Mapping):
                raise ValueError("arguments are no object")
            typed = {
                key: schemas.cast(name, key, one) if schemas and isinstance(one, str) else one
                for key, one in arguments.items()
            }
            return RawCall(name, typed)
    raise ValueError(f"no call: {value!r:.80}")

"""What tools take, by their JSON schemas."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class ToolSchemas:
    """The parameters of a request's tools."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """``tools`` are as OpenAI has them, and checked."""
        self._parameters = {
            tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools
        }

    def cast(self, tool: str, parameter: str, text: str) -> Any:  # noqa: ANN401 - of any JSON
        """The value that ``text`` says; the text itself, if no type of the parameter fits.

        Of a parameter that the schema does not know, numbers, objects and such become what they
        are in JSON.
        """
        schema = self._parameters.get(tool)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        known = properties.get(parameter) if isinstance(properties, Mapping) else None
        types = [*_types(known, schema, 0)] if known is not None else []
        value = _value(text)
        if "string" in types and not isinstance(value, (dict, list, type(None))):
            return text
        if not types or any(_IS[one](value) for one in types if one in _IS):
            return value
        if "boolean" in types and text.strip().lower() in ("true", "false"):
            return text.strip().lower() == "true"
        if "integer" in types and isinstance(value, float) and value.is_integer():
            return int(value)
        return text


_IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}
_MAX_DEPTH = 8
"""Of references and unions in a schema."""
DEFINITIONS = ("$defs", "definitions")
"""Where a schema has what it refers to."""
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}
_OF_ARGUMENTS = {"type", "properties", "required", "additionalProperties", "$schema", "strict"}


def takes_text(schema: Any, root: Any) -> bool:  # noqa: ANN401 - of a JSON schema
    """Whether a value that is no JSON may be a string of this schema; ``root`` has definitions."""
    kinds = [*_types(schema, root, 0)]
    return not kinds or "string" in kinds


def fits_tags(schema: Mapping[str, Any]) -> bool:
    """Whether arguments between tags, of which texts may be any, are always as they should be.

    Arguments whose names would break a tag do not fit, and neither do texts with a pattern.
    """
    properties = schema.get("properties") or {}
    return (
        not schema.keys() - {*_OF_ARGUMENTS, *DEFINITIONS, *_NOTES}
        and properties.keys() >= {*schema.get("required", ())}
        and all(re.fullmatch(r"[^\s<>\"]+", key) for key in properties)
        and all(_takes_any_text(one) for one in properties.values() if takes_text(one, schema))
    )


def _takes_any_text(schema: Any) -> bool:  # noqa: ANN401
    if not isinstance(schema, Mapping):
        return schema is not False
    if schema.keys() - {"type", "anyOf", "enum", "nullable", *_NOTES}:
        return False
    kinds = {*_types(schema, schema, 0)}
    if "enum" in schema:
        return all(isinstance(one, str) for one in schema["enum"])
    if "anyOf" in schema:
        branches = [one for one in schema["anyOf"] if takes_text(one, schema)]
        return not kinds & {"object", "array"} and any(map(_takes_any_text, branches))
    return not kinds & {"object", "array"}


def _types(schema: Any, root: Any, depth: int) -> Iterator[str]:  # noqa: ANN401
    """The types that a value may have."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return
    declared = schema.get("type")
    yield from (one for one in _listed(declared) if isinstance(one, str))
    if schema.get("nullable"):
        yield "null"
    if declared is None:
        values = [schema["const"]] if "const" in schema else _listed(schema.get("enum"))
        for value in values:
            if isinstance(value, str):
                yield "string"
            yield from (name for name, fits in _IS.items() if fits(value))
    for union in ("anyOf", "oneOf", "allOf"):
        for one in _listed(schema.get(union)):
            yield from _types(one, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found = root
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        yield from _types(found, root, depth + 1)


def _listed(value: Any) -> list[Any]:  # noqa: ANN401
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _value(text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text, parse_constant=_no_number)
    except ValueError:
        return text


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

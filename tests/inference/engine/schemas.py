"""Random JSON schemas, and whether a value is as one says; by nothing of llguidance."""

import re
from typing import Any

from hypothesis import strategies as st

_NAMES = st.sampled_from(["a", "b", "key with space", 'quo"te', "é"])
_LEAVES = st.one_of(
    st.tuples(st.integers(-50, 50), st.integers(0, 60)).map(
        lambda x: {"type": "integer", "minimum": x[0], "maximum": x[0] + x[1]}
    ),
    st.tuples(st.integers(-5, 5), st.sampled_from([0.5, 3, 100])).map(
        lambda x: {"type": "number", "minimum": x[0], "exclusiveMaximum": x[0] + x[1]}
    ),
    st.integers(0, 6).map(lambda x: {"type": "string", "maxLength": x}),
    st.sampled_from(["^[a-c]{1,3}$", "^(x|y{1,3}z)$", r"^\d{2}:\d{2}$", "^(é|ab)?$"]).map(
        lambda x: {"type": "string", "pattern": x}
    ),
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.text('ab"\\\n☃', max_size=3)),
        min_size=1,
        max_size=4,
        unique_by=repr,
    ).map(lambda x: {"enum": x}),
    st.sampled_from([{"const": {"k": [1, None]}}, {"type": "boolean"}, {"type": "null"}]),
    st.just({"$ref": "#/$defs/again"}),
)


def _arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(items, st.integers(0, 2), st.integers(0, 2)).map(
        lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": x[1] + x[2]}
    )


def _objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.dictionaries(_NAMES, values, max_size=3), st.integers(0, 3)).map(
        lambda x: {
            "type": "object",
            "properties": x[0],
            "required": [*x[0]][: x[1]],
            "additionalProperties": False,
        }
    )


def _alternatives(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, min_size=1, max_size=3).map(lambda x: {"anyOf": x})


_VALUES: st.SearchStrategy[dict[str, Any]] = st.recursive(
    _LEAVES, lambda x: st.one_of(_arrays(x), _objects(x), _alternatives(x)), max_leaves=6
)
_AGAIN = {
    "anyOf": [
        {"type": "null"},
        {"type": "array", "items": {"$ref": "#/$defs/again"}, "maxItems": 2},
    ]
}
SCHEMAS: st.SearchStrategy[dict[str, Any]] = _VALUES.map(
    lambda schema: {**schema, "$defs": {"again": _AGAIN}}
)
"""Objects, arrays, enums, strings with patterns, numbers with bounds, alternatives, recursion."""

_TYPES = {
    "null": type(None),
    "boolean": bool,
    "string": str,
    "array": list,
    "object": dict,
    "integer": int,
    "number": (int, float),
}


def allows(schema: dict[str, Any], value: Any, root: dict[str, Any] | None = None) -> bool:
    """Whether ``value``, read from JSON, is as ``schema`` says."""
    root = schema if root is None else root

    def fits(part: dict[str, Any], inner: Any) -> bool:
        return allows(part, inner, root)

    if "$ref" in schema:
        return fits(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    if "anyOf" in schema and not any(fits(part, value) for part in schema["anyOf"]):
        return False
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    kind = schema.get("type")
    if kind is None:
        return True
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool) != (kind == "boolean"):
        return False
    if kind == "string":
        return len(value) <= schema.get("maxLength", 1 << 30) and bool(
            re.search(schema.get("pattern", ""), value)
        )
    if kind in {"integer", "number"}:
        return bool(
            schema["minimum"] <= value
            and value <= schema.get("maximum", value)
            and value < schema.get("exclusiveMaximum", value + 1)
        )
    if kind == "array":
        return schema.get("minItems", 0) <= len(value) <= schema["maxItems"] and all(
            fits(schema["items"], one) for one in value
        )
    if kind == "object":
        return (
            {*schema["required"]} <= value.keys()
            and value.keys() <= schema["properties"].keys()
            and all(fits(schema["properties"][key], one) for key, one in value.items())
        )
    return True


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)

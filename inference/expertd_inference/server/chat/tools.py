"""Which tools of a request a model may call, and whether it must."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expertd_inference.grammar import grammar_of_json_schema
from expertd_inference.server.api.errors import ApiError, shown, wrong_value
from expertstore.errors import InvalidInputError

_NAME = re.compile(r"[^\s\"'\\<>{}()\[\]]+")
_COMPOSED = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}
"""What else may say which arguments there are."""
_CHOICES = "none, auto, required, or the function to call"


@dataclass(frozen=True)
class Tools:
    """``allowed`` may be called; one of them has to be if ``required``, and once if ``single``.

    ``places`` say by name where in the request a tool is.
    """

    allowed: tuple[Mapping[str, Any], ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    required: bool = False
    single: bool = False

    @property
    def strict(self) -> bool:
        """Whether calls of some have to be as their schemas say."""
        return any(tool["function"].get("strict") for tool in self.allowed)

    def described(self) -> Iterator[Mapping[str, Any]]:
        """Those ``allowed``, with schemas that a grammar can obey.

        Where a call is neither required nor strict, another schema becomes any object. Raises
        ApiError elsewhere.
        """
        for tool in self.allowed:
            function = tool["function"]
            name = f"JSON schema of the tool {function['name']!r:.80}"
            schema = schema_of(function)
            try:
                if schema["type"] != "object":
                    raise InvalidInputError(
                        f"The {name} is of type {schema['type']!r:.80}; tools take an object."
                    )
                replace(grammar_of_json_schema(schema), name=name).check()
            except InvalidInputError as error:
                if self.required or function.get("strict"):
                    place = f"{self.places[function['name']]}.function.parameters"
                    raise ApiError(400, f"{place}: {error}", param=place) from error
                yield {"function": {**function, "parameters": {"type": "object"}}}
            else:
                yield tool


def chosen_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None
) -> Tools:
    """OpenAI's ``tools`` and ``tool_choice``. Raises ApiError for what is none."""
    known: dict[str, Mapping[str, Any]] = {}
    places: dict[str, str] = {}
    for at, tool in enumerate(tools or ()):
        name = _name(place := f"tools[{at}]", tool)
        if name in known:
            raise ApiError(
                400,
                f"{place}.function.name is {name!r:.80}, as is that of {places[name]}; give each "
                "tool a name of its own.",
                param=f"{place}.function.name",
            )
        known[name], places[name] = tool, place
    return replace(_chosen(known, choice), places=places)


def _chosen(
    known: Mapping[str, Mapping[str, Any]], choice: str | Mapping[str, Any] | None
) -> Tools:
    match choice:
        case "none":
            return Tools()
        case None | "auto":
            return Tools(tuple(known.values()))
        case "required" | "any":
            return _required(known, list(known))
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*allowed]}} | {
            "type": "allowed_tools",
            "mode": mode,
            "tools": [*allowed],
        }:
            if mode not in ("auto", "required"):
                raise _wrong(f"has the mode {mode!r:.80}; give auto or required.")
            names = [_choice_name(one) for one in allowed]
            found = _required(known, names)
            return Tools(found.allowed, required=mode == "required")
        case {"type": "function"}:
            return replace(_required(known, [_choice_name(choice)]), single=True)
    raise _wrong(f"is {shown(choice)}; give {_CHOICES}.")


def _required(known: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Tools:
    if not names:
        raise _wrong("wants a call, and there are no tools; send tools.")
    missing = [name for name in names if name not in known]
    if missing:
        raise _wrong(f"names {missing[0]!r:.80}, which is not among the tools; name one of them.")
    return Tools(tuple(known[name] for name in names), required=True)


def schema_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool's arguments have to be; it knows no others than it names."""
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    if "properties" in schema and not _COMPOSED & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema


def _choice_name(choice: object) -> str:
    match choice:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise _wrong(f"has {shown(choice)}, which names no function; name one.")


def _name(where: str, tool: Mapping[str, Any]) -> str:
    """A tool's name, once it is known to be one."""
    if tool.get("type") != "function":
        raise ApiError(
            400,
            f"{where}.type is {shown(tool.get('type'))}, and this server takes tools of type "
            '"function" only.',
            param=f"{where}.type",
        )
    match tool.get("function"):
        case {"name": str(name), **rest} if name:
            if not _NAME.fullmatch(name):
                raise ApiError(
                    400,
                    f"{where}.function.name is {name!r:.80}; give one without spaces, quotes and "
                    "brackets.",
                    param=f"{where}.function.name",
                )
            parameters = rest.get("parameters")
            if parameters is not None and not isinstance(parameters, Mapping):
                raise wrong_value(f"{where}.function.parameters", parameters, "a JSON schema")
            return name
    raise ApiError(400, f"{where}.function has no name; give one.", param=f"{where}.function")


def _wrong(what: str) -> ApiError:
    return ApiError(400, f"tool_choice {what}", param="tool_choice")

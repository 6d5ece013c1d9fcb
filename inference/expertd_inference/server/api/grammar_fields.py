"""How a client says which texts it takes: OpenAI's field, vLLM's and llama.cpp's."""

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from expertd_inference.grammar import (
    GrammarKind,
    GrammarSpec,
    grammar_of_choice,
    grammar_of_json_object,
    grammar_of_json_schema,
    grammar_of_regex,
    grammar_of_text,
)
from expertd_inference.server.api.errors import ApiError, unsupported
from expertstore.errors import InvalidInputError

Schema = dict[str, Any] | bool | str
"""A JSON schema, or the text of one."""


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """OpenAI's wrapping of a schema. It is always obeyed, ``strict`` or not."""

    name: str | None = None
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's field; ``schema`` is llama.cpp's, beside ``json_object``."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Schema | None = None

    def grammar(self) -> GrammarSpec | None:
        """What it asks for. Raises ApiError."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return grammar_of_json_object() if self.schema is None else _of(self.schema)
            case "json_schema":
                wrapped = self.json_schema
                schema = self.schema if wrapped is None else wrapped.schema
                if schema is None:
                    raise ApiError(
                        400,
                        "response_format.json_schema has no schema; give one.",
                        param="response_format.json_schema",
                    )
                return _of(schema)
        raise unsupported(
            "response_format",
            f"has the type {self.type!r:.40}; give text, json_object or json_schema.",
        )


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's field."""

    idle: ClassVar = frozenset({"disable_fallback"})
    json: Schema | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    # How vLLM's other backends do it.
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class GrammarFields(msgspec.Struct, kw_only=True):
    """Fields of a request that say which texts may be answered. One of them is given at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: str | None = None
    json_schema: Schema | None = None

    def grammar_spec(self) -> GrammarSpec | None:
        """What they ask for, if anything; checked as far as :meth:`GrammarSpec.check` does.

        Raises ApiError, InvalidInputError, and PreconditionError without llguidance.
        """
        asked = self._asked()
        if len(asked) > 1:
            raise ApiError(
                400, f"{' and '.join(asked)} exclude each other; give one.", param=[*asked][1]
            )
        for name, (make, value) in asked.items():
            try:
                spec: GrammarSpec = make(value)
                spec.check()
            except InvalidInputError as error:
                raise ApiError(400, f"{name}: {error}", param=name) from error
            return spec
        return None

    def _asked(self) -> dict[str, tuple[Callable[[Any], GrammarSpec], Any]]:
        """By field: what makes a grammar, and of what."""
        vllm = self.structured_outputs or StructuredOutputs()
        if vllm.structural_tag is not None:
            raise unsupported("structured_outputs", "has structural_tag; give a Lark grammar.")
        if vllm.whitespace_pattern is not None or vllm.disable_any_whitespace:
            raise unsupported(
                "structured_outputs", "says which whitespace JSON may have; leave that out."
            )
        if self.guided_whitespace_pattern is not None:
            raise unsupported("guided_whitespace_pattern", "is not supported; leave it out.")
        if vllm.disable_additional_properties:
            raise unsupported(
                "structured_outputs",
                "has disable_additional_properties; say additionalProperties in the schema.",
            )
        makers: dict[str, tuple[Callable[[Any], GrammarSpec], Any]] = {
            "structured_outputs.json": (_of, vllm.json),
            "structured_outputs.regex": (grammar_of_regex, vllm.regex),
            "structured_outputs.choice": (grammar_of_choice, vllm.choice),
            "structured_outputs.grammar": (grammar_of_text, vllm.grammar),
            "structured_outputs.json_object": (_any_object, vllm.json_object or None),
            "guided_json": (_of, self.guided_json),
            "guided_regex": (grammar_of_regex, self.guided_regex),
            "guided_choice": (grammar_of_choice, self.guided_choice),
            "guided_grammar": (grammar_of_text, self.guided_grammar),
            "grammar": (grammar_of_text, self.grammar or None),
            "json_schema": (_of, self.json_schema),
        }
        asked = {name: made for name, made in makers.items() if made[1] is not None}
        spec = None if self.response_format is None else self.response_format.grammar()
        if spec is not None:
            asked["response_format"] = (lambda made: made, spec)
        return asked


def _of(schema: Schema) -> GrammarSpec:
    if isinstance(schema, str):
        return GrammarSpec(GrammarKind.JSON_SCHEMA, schema)
    return grammar_of_json_schema(schema)


def _any_object(_: bool) -> GrammarSpec:
    return grammar_of_json_object()

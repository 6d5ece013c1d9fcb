"""A family is recognized by what its chat templates have."""

from typing import Any, cast

import pytest

from expertd_inference.server.chat.families import FAMILIES, NAMES, family_named
from expertd_inference.server.chat.recognition import family_of
from expertd_inference.server.chat.schemas import ToolSchemas
from expertd_inference.server.hosting.model_text import ModelText
from expertstore.errors import InvalidInputError

SIGNS = {
    "gpt-oss": "{{ '<|start|>assistant<|channel|>final<|message|>' }}",
    "gemma4": "{{- '<|tool_call>call:' + function['name'] -}}",
    "deepseek-v3.2": "<｜DSML｜function_calls>",
    "deepseek": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type']",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "minimax": "{%- set toolcall_begin_token = '<minimax:tool_call>' -%}<invoke name=",
    "mistral": '{{- "[TOOL_CALLS] [" }}',
    "hunyuan": "<think><tool_calls>[{",
    "granite": "<|start_of_role|>assistant<|end_of_role|><|tool_call|>",
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "qwen-coder": "<tool_call>\n<function=example>\n<parameter=a>",
    "hermes": '<think><tool_call>\\n{"name": ',
    "llama3": "<|start_header_id|>ipython<|end_header_id|>",
    "think": "{{ '<think>\\n' }}",
    "plain": "{{ message.role }}: {{ message.content }}",
}


class _Text:
    """A ModelText without a tokenizer."""

    def __init__(
        self, templates: str = "", added: tuple[str, ...] = (), chat_format: str | None = None
    ) -> None:
        self.templates = templates
        self.added_tokens = dict.fromkeys(added, 0)
        self.chat_format = chat_format
        self.response_template = None


@pytest.mark.parametrize("name", NAMES)
def test_by_the_template(name: str) -> None:
    assert family_of(cast("ModelText", _Text(SIGNS[name]))).name == name


def test_by_the_vocabulary_if_the_template_says_nothing() -> None:
    kimi = _Text(SIGNS["plain"], ("<|im_end|>", "<|tool_calls_section_begin|>"))
    assert family_of(cast("ModelText", kimi)).name == "kimi"


def test_by_its_name_whatever_the_template_has() -> None:
    assert family_of(cast("ModelText", _Text(SIGNS["kimi"], (), "plain"))).name == "plain"
    with pytest.raises(InvalidInputError, match="no chat format 'klingon'; give one of gpt-oss, "):
        family_named("klingon")


def test_no_marker_has_two_meanings() -> None:
    for family in FAMILIES:
        opens = [one for region in family.regions for one in region.opens]
        assert len(opens) == len(set(opens)), family.name


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "integer"]}, "3", "3"),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "three", "three"),
        ({"type": "number"}, "2.5", 2.5),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "array"}, "[1]", [1]),
        ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, "[1]", [1]),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, "[1", "[1"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"$ref": "#/$defs/count"}, "4", 4),
        ({"$ref": "#/$defs/loop"}, "4", 4),
        ({"description": "anything"}, "[true]", [True]),
        ({"description": "anything"}, "[true", "[true"),
        ({"type": 7}, "x", "x"),
    ],
)
def test_texts_become_what_the_schema_says(schema: Any, text: str, value: Any) -> None:
    definitions = {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}
    parameters = {"properties": {"p": schema}, "$defs": definitions}
    schemas = ToolSchemas([{"function": {"name": "f", "parameters": parameters}}])
    found = schemas.cast("f", "p", text)
    assert found == value
    assert type(found) is type(value)

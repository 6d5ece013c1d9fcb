"""Calls of tools that are none: what their readers refuse becomes content."""

from collections.abc import Callable
from typing import Any

import pytest

from expertd_inference.server.chat import calls
from expertd_inference.server.chat.own_format import _call as own_call
from expertd_inference.server.chat.schemas import ToolSchemas, fits_tags

NONE = ToolSchemas(())
Read = Callable[[str, ToolSchemas], Any]


@pytest.mark.parametrize(
    ("read", "body", "words"),
    [
        (calls.json_calls, "3", "a call is no object"),
        (calls.json_calls, '{"arguments": {}}', "a call has no name"),
        (calls.json_calls, '{"name": " "}', "a call has no name"),
        (calls.json_calls, '{"name": "f", "arguments": [1]}', "arguments are no object"),
        (calls.deepseek_call, "f{}", "no separator: f"),
        (calls.kimi_call, "functions.f:0{}", "no arguments: functions.f"),
        (calls.harmony_call, "functions.f{}", "no message: functions.f"),
        (calls.mistral_calls, "f(1)", r"no call: f\(1\)"),
    ],
)
def test_what_is_no_call(read: Read, body: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(body, NONE)


@pytest.mark.parametrize(
    "body",
    [
        '{"function": {"name": "f", "arguments": {"a": 1}}}',
        '{"type": "function", "function": "f", "parameters": {"a": 1}}',
        '{"name": " f", "arguments": "{\\"a\\": 1}"}',
    ],
)
def test_ways_to_write_one(body: str) -> None:
    (call,) = calls.json_calls(body, NONE)
    assert (call.name, call.arguments) == ("f", {"a": 1})


def test_one_without_arguments() -> None:
    (call,) = calls.json_calls('{"name": "f", "arguments": ""}', NONE)
    assert call.arguments == {}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"function": {"name": "f", "arguments": [1]}}, "arguments are no object"),
        ({"function": {"name": ""}}, "no call: {'function'"),
        (3, "no call: 3"),
    ],
)
def test_what_is_none_in_a_format_of_the_tokenizer_s_own(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        own_call(value, None)


@pytest.mark.parametrize(
    ("schema", "fits"),
    [
        ({"type": "string"}, True),
        ({"type": "string", "nullable": True}, True),
        ({"type": "string", "pattern": "a"}, False),
        ({"type": "string", "enum": ["a", "b"]}, True),
        ({"enum": ["a", 1]}, False),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, True),
        ({"anyOf": [{"type": "string", "pattern": "a"}, {"type": "null"}]}, False),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, False),
        ({"type": "object"}, True),
    ],
)
def test_arguments_between_tags(schema: Any, fits: bool) -> None:
    assert fits_tags({"type": "object", "properties": {"a": schema}}) is fits

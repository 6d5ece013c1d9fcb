"""Formats that tokenizers describe themselves, in the form that transformers has for it."""

from typing import Any

import pytest

from expertd_inference.server.chat.families import Family
from expertd_inference.server.chat.own_format import family_described
from tests.inference.server.chat.recorded import RECORDED, Recorded
from tests.inference.server.chat.test_answers import expected, read_by

THINK = {"open": "<think>", "close": "</think>", "content": "text"}
CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
DESCRIBED: dict[str, dict[str, Any]] = {
    "hermes": {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": THINK,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"\s*(?:<\|im_end\|>)", "content": "text"},
        },
    },
    "qwen-coder": {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": THINK,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>"
                },
                "transform": CALL,
            },
            "content": {"content": "text"},
        },
    },
    "gemma4": {
        "start_anchor": ["<|turn>model\n", "<tool_response|>"],
        "fields": {
            "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
            "tool_calls": {
                "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
                "close": "<tool_call|>",
                "repeats": True,
                "content": "json",
                "content_args": {
                    "unquoted_keys": True,
                    "string_delims": [['<|"|>', '<|"|>']],
                },
                "transform": CALL,
            },
            "content": {"close": ["<turn|>", "<|tool_response>"], "content": "text"},
        },
    },
}
TOLERANT = {
    "qwen-coder: without the outer tag",
    "hermes: reasoning left by a call",
}
"""What our own family reads, and the description does not have."""
NAMES = [
    name
    for name, recorded in RECORDED.items()
    if recorded.family in DESCRIBED and name not in TOLERANT
]


def family(recorded: Recorded) -> Family:
    found = family_described(DESCRIBED[recorded.family])
    assert found is not None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_read_as_described_cut_anywhere(name: str) -> None:
    recorded = RECORDED[name]
    for at in range(len(recorded.text) + 1):
        pieces = [recorded.text[:at], recorded.text[at:]]
        assert read_by(family(recorded), recorded.prompt, pieces) == expected(recorded), at


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": {"open_pattern": r"\w+", "close": "x", "content": "text"}},
        {"tool_calls": {"open_pattern": "<a>|<b>", "close": "x", "content": "text"}},
        {"tool_calls": {"open": "<a>", "content": "no such parser"}},
        {},
    ],
)
def test_a_description_that_cannot_be_used_is_none(fields: dict[str, Any]) -> None:
    assert family_described({"start_anchor": "<a>", "fields": fields}) is None

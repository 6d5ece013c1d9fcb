"""Structured output over HTTP, by OpenAI's fields, vLLM's and llama.cpp's."""

import json
import re
from typing import Any

import httpx2
import pytest

from tests.inference.server.events import stream, text_of

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "ages": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 20},
            "maxItems": 2,
        },
    },
    "required": ["kind", "ages"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}}
# Else a model that knows nothing may go on with spaces for ever.
ASKED = {"max_tokens": 200, "temperature": 1.0, "seed": 4, "frequency_penalty": 2.0}
CHAT = {**ASKED, "messages": [{"role": "user", "content": "Which pet?"}]}
COMPLETION = {**ASKED, "prompt": "Which pet?"}


def answered(http: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return choices


def check_pet(text: str) -> None:
    pet = json.loads(text)
    assert pet.keys() == {"kind", "ages"}
    assert pet["kind"] in {"cat", "dog"}
    assert all(age <= 20 for age in pet["ages"])


def test_a_chat_answers_with_json_of_a_schema_streamed_or_not(http: httpx2.Client) -> None:
    body = {**CHAT, "response_format": FORMAT, "n": 2}
    texts = [
        choice["message"]["content"] for choice in answered(http, "/v1/chat/completions", body)
    ]
    for text in texts:
        check_pet(text)
    events = stream(http, "/v1/chat/completions", {**body, "n": 1})
    assert text_of(events) == texts[0]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_format_holds_after_reasoning_that_the_prompt_began(http: httpx2.Client) -> None:
    body = {**CHAT, "model": "thinks", "response_format": FORMAT, "max_tokens": 30}
    message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert re.search("[a-z]{3}", message["reasoning_content"])
    assert message["content"] == ""
    # What comes after reasoning is in the format at once.
    tokens = http.post("/tokenize", json={"content": "</think>"}).json()["tokens"]
    biased = {**body, "logit_bias": dict.fromkeys(tokens, 100), "max_tokens": 300}
    choice = http.post("/v1/chat/completions", json=biased).json()["choices"][0]
    if choice["message"]["content"]:
        check_pet(choice["message"]["content"])


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r"\{[^z]*\}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r"\{[^z]*\}"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
        ({"guided_json": SCHEMA}, r"\{[^z]*\}"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"json_schema": SCHEMA}, r"\{[^z]*\}"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_each_field_says_what_may_be_written(
    fields: dict[str, Any], pattern: str, http: httpx2.Client
) -> None:
    (choice,) = answered(http, "/v1/completions", {**COMPLETION, **fields})
    assert re.fullmatch(pattern, choice["text"], re.DOTALL)
    if "{" in pattern and "z" in pattern:
        check_pet(choice["text"])


def test_plain_text_is_no_grammar(http: httpx2.Client) -> None:
    body = {**CHAT, "max_tokens": 8}
    plain, asked = (
        http.post("/v1/chat/completions", json={**body, **more}).json()["choices"][0]["message"]
        for more in ({}, {"response_format": {"type": "text"}, "grammar": ""})
    )
    assert plain == asked


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {"type": "strnig"}}, "guided_json", "JSON schema cannot be used"),
        ({"guided_json": "{"}, "guided_json", "JSON schema cannot be used"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"grammar": "root ::= a"}, "grammar", "Rule 'a' not found"),
        ({"guided_choice": []}, "guided_choice", "it has no text"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude each other"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "has no schema",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "Lark"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "leave it out"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs", "whitespace"),
        (
            {"structured_outputs": {"disable_additional_properties": True}},
            "structured_outputs",
            "say additionalProperties in the schema",
        ),
        ({"grammar": "start: <|nope|>"}, None, "unknown special token"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_cannot_be_done_is_refused(
    fields: dict[str, Any], param: str | None, words: str, http: httpx2.Client
) -> None:
    for streamed in (False, True):
        body = {**COMPLETION, **fields, "stream": streamed}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert words in error["message"]
        assert "\n" not in error["message"]

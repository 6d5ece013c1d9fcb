"""Calls that a client requires, over HTTP, from a model that knows no tools at all."""

import json
from typing import Any

import httpx2
import pytest

from tests.inference.server.events import stream, text_of

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": CITY, **more}}


TOOLS = [tool("look"), tool("go")]
LOOK = {"type": "function", "function": {"name": "look"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [LOOK]}}
MESSAGES = [{"role": "user", "content": "Where?"}]
# Else a model that knows nothing may go on with spaces for ever.
ASKED = {"max_tokens": 800, "temperature": 1.0, "frequency_penalty": 2.0, "seed": 7}
CHAT = {**ASKED, "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}


def check(name: str, arguments: Any, among: tuple[str, ...] = ("look", "go")) -> None:
    assert name in among
    assert arguments.keys() == {"city", "days"}
    assert arguments["city"] in ("Rome", "Oslo")
    assert 1 <= arguments["days"] <= 9


def check_choice(choice: dict[str, Any], among: tuple[str, ...] = ("look", "go")) -> None:
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] is None
    for call in message["tool_calls"]:
        check(call["function"]["name"], json.loads(call["function"]["arguments"]), among)


def several(model: str) -> dict[str, bool]:
    """Whether more calls may follow the first: without a separator some models never end."""
    return {"parallel_tool_calls": model != "gemma"}


def chat(http: httpx2.Client, **more: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json={**CHAT, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("choice", ["required", LOOK, ALLOWED], ids=["any", "named", "allowed"])
@pytest.mark.parametrize("model", ["example", "coder", "mistral", "gemma"])
def test_a_chat_calls_what_it_has_to(model: str, choice: Any, http: httpx2.Client) -> None:
    for one in chat(http, tool_choice=choice, n=2, model=model, **several(model))["choices"]:
        check_choice(one, ("look", "go") if choice == "required" else ("look",))
        assert choice != LOOK or len(one["message"]["tool_calls"]) == 1, "as OpenAI has it"


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        *((model, "required") for model in ("example", "coder", "mistral", "gemma")),
        ("example", LOOK),
    ],
)
def test_a_stream_has_the_same_calls(model: str, choice: Any, http: httpx2.Client) -> None:
    body = {"model": model, "tool_choice": choice, **several(model)}
    (whole,) = chat(http, **body)["choices"]
    events = stream(http, "/v1/chat/completions", {**CHAT, **body})
    deltas = [one["choices"][0]["delta"] for one in events]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    wanted = [call["function"] for call in whole["message"]["tool_calls"]]
    assert [call["function"] for call in calls] == wanted
    assert text_of(events) == ""
    assert deltas[0] == {"role": "assistant"}, "no content, as OpenAI has it"
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("model", "begun"),
    [
        ("example", '<tool_call>\n{"name": '),
        ("coder", "<tool_call>\n<function="),
        ("mistral", '[TOOL_CALLS] [{"name'),
        ("gemma", "<|tool_call>call:"),
    ],
)
def test_a_call_that_is_cut_is_content(model: str, begun: str, http: httpx2.Client) -> None:
    body = {"model": model, "max_tokens": 20}
    (choice,) = chat(http, **body)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith(begun)
    assert "tool_calls" not in choice["message"]
    events = stream(http, "/v1/chat/completions", {**CHAT, **body})
    assert text_of(events) == choice["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_one_call_where_several_are_not_wanted(http: httpx2.Client) -> None:
    for seed in range(3):
        (choice,) = chat(http, parallel_tool_calls=False, seed=seed)["choices"]
        check_choice(choice)
        assert len(choice["message"]["tool_calls"]) == 1


def test_calls_or_content_of_a_format(http: httpx2.Client) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"]}}}
    (choice,) = chat(http, response_format=wanted)["choices"]
    check_choice(choice)
    (choice,) = chat(http, response_format=wanted, tool_choice="none")["choices"]
    assert choice["message"]["content"] == '"a"'


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look"}])
def test_messages_of_anthropic(choice: dict[str, Any], streamed: bool, http: httpx2.Client) -> None:
    tools = [{"name": name, "input_schema": CITY} for name in ("look", "go")]
    body = {"max_tokens": 800, "temperature": 1.0, "messages": MESSAGES, "tools": tools}
    body |= {"tool_choice": {**choice, "disable_parallel_tool_use": True}, "stream": streamed}
    response = http.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    if streamed:
        lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        (begun,) = (one["content_block"] for one in events if one["type"] == "content_block_start")
        (delta,) = (one["delta"] for one in events if one["type"] == "content_block_delta")
        given, reason = json.loads(delta["partial_json"]), events[-2]["delta"]["stop_reason"]
    else:
        (begun,) = response.json()["content"]
        given, reason = begun["input"], response.json()["stop_reason"]
    assert (begun["type"], reason) == ("tool_use", "tool_use")
    check(begun["name"], given, (choice.get("name", "look"), choice.get("name", "go")))


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "look"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"name": "look"}]},
    ],
    ids=["any", "named", "allowed"],
)
def test_responses(choice: Any, http: httpx2.Client) -> None:
    tools = [{"type": "function", "name": name, "parameters": CITY} for name in ("look", "go")]
    body = {"input": "Where?", "tools": tools, "tool_choice": choice, "max_output_tokens": 300}
    response = http.post("/v1/responses", json={**body, "frequency_penalty": 2.0})
    assert response.status_code == 200, response.text
    for item in response.json()["output"]:
        assert item["type"] == "function_call"
        among = ("look", "go") if choice == "required" else ("look",)
        check(item["name"], json.loads(item["arguments"]), among)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"$ref": "#"},
            "tools[0].function.parameters: The JSON schema of the tool 'look' cannot be used: "
            "circular references",
        ),
        ({"type": "strnig"}, "The JSON schema of the tool 'look' is of type 'strnig'"),
        (
            {"properties": {"x": {"type": "strnig"}}},
            "tools[0].function.parameters: The JSON schema of the tool 'look' cannot",
        ),
    ],
)
def test_a_schema_that_cannot_be_obeyed_is_refused(
    parameters: dict[str, Any], words: str, http: httpx2.Client
) -> None:
    wrong: dict[str, Any] = {
        "type": "function",
        "function": {"name": "look", "parameters": parameters},
    }
    strict = {"function": {**wrong["function"], "strict": True}, "type": "function"}
    forced = {**CHAT, "model": "mistral", "tools": [wrong]}
    for body in (forced, {**forced, "tool_choice": "auto", "tools": [strict]}):
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert words in error["message"]
        assert error["param"] == "tools[0].function.parameters"
    response = http.post(
        "/v1/chat/completions", json={**forced, "tool_choice": "auto", "max_tokens": 2}
    )
    assert response.status_code == 200, response.text

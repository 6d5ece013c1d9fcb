"""OpenAI's responses, by openai-python and by hand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import msgspec
import openai
import pytest

from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.responses import _Responding
from expertd_inference.server.api.responses_output import Output
from expertd_inference.server.api.responses_request import (
    ResponsesRequest,
    messages_of,
    openai_fields,
    refuse_unserved,
)
from expertd_inference.server.api.responses_store import ResponseStore, Stored
from expertd_inference.server.chat.answer import Piece
from expertd_testing.server import Server
from tests.inference.server.said import Said, streamed

GREEDY: Any = {"model": "example", "max_output_tokens": 6, "temperature": 0}
REQUIRED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model"),
    *("previous_response_id", "instructions", "output", "error", "tools", "tool_choice"),
    *("truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty", "temperature"),
    *("frequency_penalty", "top_logprobs", "reasoning", "usage", "max_output_tokens", "store"),
    *("max_tool_calls", "background", "service_tier", "metadata", "safety_identifier"),
    "prompt_cache_key",
}
"""Of the Open Responses schema, 2026-04-24."""


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", _strict_response_validation=True
    ) as made:
        yield made


def greedy_text(http: httpx2.Client, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
    text: str = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_a_response_is_the_chat_s_answer(client: openai.OpenAI, http: httpx2.Client) -> None:
    response = client.responses.create(**GREEDY, input="Hello", instructions="Be brief.")
    wanted = greedy_text(http, "<system>Be brief.</system><user>Hello</user><assistant>")
    assert response.output_text == wanted
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 6
    count = client.responses.input_tokens.count(
        model="example", input="Hello", instructions="Be brief."
    )
    assert count.input_tokens == response.usage.input_tokens
    raw = http.post("/v1/responses", json={**GREEDY, "input": "Hello"}).json()
    assert len(REQUIRED) == 31
    assert raw.keys() >= REQUIRED


def test_a_stream_says_the_same_in_numbered_events(
    client: openai.OpenAI, http: httpx2.Client
) -> None:
    whole = client.responses.create(**GREEDY, input="Hello")
    with client.responses.stream(**GREEDY, input="Hello") as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == whole.output_text
    asked = {**GREEDY, "input": "Hello", "stream": True}
    lines = http.post("/v1/responses", json=asked).text.splitlines()
    names = [line.removeprefix("event: response.") for line in lines if line.startswith("event: ")]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == [
        *("output_text.done", "content_part.done", "output_item.done"),
        "incomplete",
    ]
    assert lines[-2] == "data: [DONE]"
    data = [json.loads(line[6:]) for line in lines[:-2] if line.startswith("data: ")]
    assert [one["sequence_number"] for one in data] == list(range(len(names)))
    assert [one["type"] for one in data] == [f"response.{name}" for name in names]


def test_a_kept_response_is_gone_on_with_and_deleted(
    client: openai.OpenAI, http: httpx2.Client
) -> None:
    first = client.responses.create(**GREEDY, input="Hello", instructions="Not kept.")
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(**GREEDY, input="More", previous_response_id=first.id)
    chat = f"<user>Hello</user><assistant>{first.output_text}</assistant><user>More</user>"
    assert second.output_text == greedy_text(http, f"{chat}<assistant>")
    with pytest.raises(openai.BadRequestError, match="is complete, and cannot be cancelled"):
        client.responses.cancel(first.id)
    kept = http.get(f"/v1/responses/{first.id}")
    assert kept.headers["content-type"] == "application/json"
    streamed = http.get(f"/v1/responses/{first.id}", params={"stream": "true"})
    assert streamed.status_code == 400
    assert "A kept response is complete" in streamed.json()["error"]["message"]
    assert http.post("/v1/responses/resp_none/cancel").status_code == 404
    deleted = http.delete(f"/v1/responses/{first.id}").json()
    assert deleted == {"id": first.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError, match="There is no response"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
        client.responses.create(**GREEDY, input="More", previous_response_id=first.id)
    unkept = client.responses.create(**GREEDY, input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_what_was_asked_for_is_told(client: openai.OpenAI) -> None:
    plain = client.responses.create(**GREEDY, input="Hello")
    assert (plain.top_p, plain.top_logprobs) == (1, 0)
    asked = client.responses.create(**GREEDY, input="Hello", top_p=0.5, top_logprobs=2)
    assert (asked.top_p, asked.top_logprobs) == (0.5, 2)


def test_a_streamed_response_is_kept_too(client: openai.OpenAI) -> None:
    with client.responses.stream(**GREEDY, input="Hello") as stream:
        last = list(stream)[-1]
    assert last.type == "response.incomplete"
    final = last.response
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_log_probabilities_come_if_included(client: openai.OpenAI) -> None:
    response = client.responses.create(
        **GREEDY, input="Hello", include=["message.output_text.logprobs"], top_logprobs=2
    )
    message = response.output[0]
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None
    assert [len(one.top_logprobs) for one in logprobs] == [2] * 6


def test_nothing_said_is_an_empty_message_of_the_user(
    client: openai.OpenAI, http: httpx2.Client
) -> None:
    response = client.responses.create(**GREEDY)
    assert response.output_text == greedy_text(http, "<user></user><assistant>")


def test_items_become_messages() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Look"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "hear", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c2", "output": "noise"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "So"}]},
        {"type": "function_call", "call_id": "c3", "name": "look", "arguments": "{}"},
    ]
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    hear = {"id": "c2", "type": "function", "function": {"name": "hear", "arguments": "{}"}}
    assert messages_of(items) == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "content": "Well",
            "reasoning_content": "Hm",
            "tool_calls": [{"id": "c1", **call}, hear],
        },
        {"role": "tool", "tool_call_id": "c2", "content": "noise", "name": "hear"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "So",
            "tool_calls": [{"id": "c3", **call}],
        },
    ]


FUNCTION = {"type": "function", "name": "f", "parameters": {}}
GROUP = {"type": "namespace", "name": "group", "description": "All of it."}


async def test_functions_of_a_namespace_are_called_by_it(call_of_tool: Any) -> None:
    tools = [{**FUNCTION, "name": "look"}, {**GROUP, "tools": [FUNCTION]}]
    body = convert({"input": "x", "tools": tools})
    offered = openai_fields(body, [])["tools"]
    assert [tool["function"]["name"] for tool in offered] == ["look", "f"]
    said: Any = Said(Piece(calls=(call_of_tool, replace(call_of_tool, name="look"))))
    answer = await _Responding(said, body, [], ResponseStore(), "user").answer()
    assert [(one["name"], one.get("namespace")) for one in answer["output"]] == [
        ("f", "group"),
        ("look", None),
    ]
    assert answer["tools"][1] == tools[1]


def test_a_format_of_the_chat_s_own_stays() -> None:
    body = msgspec.convert({"text": {"format": {"type": "json_object"}}}, ResponsesRequest)
    assert openai_fields(body, [])["response_format"] == {"type": "json_object"}


def test_tools_formats_and_effort_are_a_chat_s() -> None:
    tool = {"type": "function", "name": "look", "parameters": {}, "strict": True}
    body = {
        "input": "x",
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "look"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
    }
    fields = openai_fields(convert(body), [])
    function = {"name": "look", "parameters": {}, "strict": True}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert fields["reasoning_effort"] == "low"
    schema = {"name": "n", "schema": {}, "strict": True}
    assert fields["response_format"] == {"type": "json_schema", "json_schema": schema}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [tool]}
    choice = openai_fields(convert({**body, "tool_choice": allowed}), [])["tool_choice"]
    assert choice["allowed_tools"] == {
        "mode": "required",
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"background": True}, "background is not supported"),
        ({"conversation": "c"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "no templates are stored"),
        ({"truncation": "auto"}, "truncation may only be disabled"),
        ({"context_management": [{"type": "compaction"}]}, "context_management is not"),
        ({"tools": [{"type": "web_search"}]}, "it takes functions only"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "mcp"}}, 'of type "mcp"'),
        ({"tools": [FUNCTION, {**GROUP, "tools": [FUNCTION]}]}, "tools[1].tools[0] has the name"),
        ({"tools": [{**GROUP, "tools": [{"type": "custom"}]}]}, "tools[0].tools[0] is of type"),
        ({"tools": [{"type": "namespace"}]}, "tools[0].name is null; give a text"),
        ({"tools": [{**GROUP, "tools": 3}]}, "tools[0].tools is 3; give a list of functions"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 'of type "item_reference"'),
        (
            {"input": [{"role": "user", "content": 3}]},
            "input[0].content is 3; give a text, or a list of parts",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "x"}]},
            "input[0].output is null; give a text",
        ),
    ],
)
def test_what_is_not_served_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        _translated(body)
    assert message in refused.value.message


def test_reasoning_messages_and_calls_are_items(call_of_tool: Any) -> None:
    output = Output()
    pieces = [
        Piece(reasoning="Hm"),
        Piece(),
        Piece(content="Well", calls=(call_of_tool,)),
    ]
    events = [one for piece in pieces for one in output.add(piece, ["p"])]
    events += output.complete("completed")
    assert [one["type"].removeprefix("response.") for one in events] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
    ]
    reasoning, message, call = output.items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    # A token whose text came later is counted with it.
    assert message["content"][0]["logprobs"] == ["p", "p"]
    assert (call["call_id"], call["name"], call["arguments"]) == ("c", "f", '{"a": 1}')
    assert all(item["status"] == "completed" for item in output.items)
    assert [one["output_index"] for one in events] == [0] * 6 + [1] * 6 + [2] * 4


async def test_a_call_is_kept_for_its_output(call_of_tool: Any) -> None:
    store = ResponseStore()
    said: Any = Said(Piece(reasoning="Hm"), Piece(calls=(call_of_tool,)))
    answer = await _Responding(said, convert({"input": "Hello"}), [], store, "user").answer()
    assert answer["status"] == "completed"
    assert answer["completed_at"] >= answer["created_at"]
    stored = store.get("user", answer["id"])
    assert stored is not None
    output = {"type": "function_call_output", "call_id": "c", "output": "light"}
    assert openai_fields(convert({"input": [output]}), stored.chat)["messages"] == [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "light", "name": "f"},
    ]


async def test_a_stream_that_breaks_ends_with_a_failed_response() -> None:
    said: Any = Said(Piece(content="Well"), error=ApiError(503, "It broke."))
    store = ResponseStore()
    responding = _Responding(said, convert({"input": "Hello"}), [], store, "user")
    lines = await streamed(responding.events(), responding.failed)
    assert lines[-2] == "data: [DONE]"
    data = [json.loads(line[6:]) for line in lines[:-2] if line.startswith("data: ")]
    assert [one["sequence_number"] for one in data] == list(range(len(data)))
    assert data[-1]["type"] == "response.failed"
    failed = data[-1]["response"]
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "server_error", "message": "It broke."}
    assert store.get("user", failed["id"]) is None


def test_the_store_drops_what_was_not_used_for_longest() -> None:
    store = ResponseStore(max_responses=3, max_bytes=100)
    for name in "abc":
        store.put("user", name, Stored(b"x" * 10, b"[]"))
    assert store.get("user", "a") is not None
    assert store.get("another", "a") is None
    store.put("user", "d", Stored(b"x" * 10, b"[]"))
    assert [store.get("user", name) is not None for name in "abcd"] == [True, False, True, True]
    store.put("user", "e", Stored(b"x" * 80, b"[]"))
    assert [store.get("user", name) is not None for name in "acde"] == [False, False, True, True]
    assert store.delete("user", "e")
    assert not store.delete("user", "e")
    store.put("user", "f", Stored(b"x" * 80, b"[]"))
    assert store.get("user", "d") is not None


def _translated(body: dict[str, Any]) -> dict[str, Any]:
    asked = convert(body)
    refuse_unserved(asked)
    return openai_fields(asked, [])


def convert(body: dict[str, Any]) -> ResponsesRequest:
    return msgspec.convert(body, ResponsesRequest)

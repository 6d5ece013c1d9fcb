"""Anthropic's interface, by its own client and by hand."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest

from expertd_inference.engine.stops import FinishReason
from expertd_inference.server.api.anthropic import _Blocks, _error_events, _Message
from expertd_inference.server.api.anthropic_request import MessagesRequest, openai_fields
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.chat.answer import Piece
from expertd_testing.server import Server
from tests.inference.server.said import Said, streamed

HELLO: Any = [{"role": "user", "content": "Hello"}]
ASKED: Any = {"model": "example", "messages": HELLO, "max_tokens": 6}
# The client has no word for it any more.
GREEDY: Any = {**ASKED, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any") as made:
        yield made


def greedy_text(http: httpx2.Client, prompt: str, **more: Any) -> str:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
    text: str = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_a_message_is_the_chat_s_answer(client: anthropic.Anthropic, http: httpx2.Client) -> None:
    message = client.messages.create(**GREEDY, system="Be brief.")
    wanted = greedy_text(http, "<system>Be brief.</system><user>Hello</user><assistant>")
    assert message.content[0].type == "text"
    assert message.content[0].text == wanted
    assert message.id.startswith("msg_")
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 6
    count = client.messages.count_tokens(model="example", messages=HELLO, system="Be brief.")
    used = message.usage
    assert count.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_a_stream_is_the_same_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**GREEDY)
    with client.messages.stream(**GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["text"]
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert [block.to_dict()["text"] for block in final.content] == [text]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 6


def test_events_have_names_and_come_in_order(http: httpx2.Client) -> None:
    response = http.post("/v1/messages?beta=true", json={**ASKED, "stream": True})
    names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    data = [json.loads(line[6:]) for line in response.text.splitlines() if line[:5] == "data:"]
    assert [one["type"] for one in data] == names


def test_a_stop_sequence_is_named(http: httpx2.Client, client: anthropic.Anthropic) -> None:
    text = greedy_text(http, "<user>Hello</user><assistant>")
    stop = text[2:5]
    message = client.messages.create(**GREEDY, stop_sequences=["never", stop])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == stop
    assert message.content[0].type == "text"
    assert message.content[0].text == text[: text.index(stop)]


def test_the_beginning_of_an_answer_is_continued(
    client: anthropic.Anthropic, http: httpx2.Client
) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "def"}]
    message = client.messages.create(**{**GREEDY, "messages": begun})
    assert message.content[0].type == "text"
    assert message.content[0].text == greedy_text(http, "<user>Hello</user><assistant>def")


def test_models_are_listed_in_its_form_too(client: anthropic.Anthropic) -> None:
    page = client.models.list()
    listed = {(model.id, model.display_name) for model in page}
    assert {("example", "example"), ("alias", "alias")} <= listed
    assert client.models.retrieve("alias").type == "model"


def test_errors_have_anthropic_s_form(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="There is no model 'other'") as failed:
        client.messages.create(**{**GREEDY, "model": "other"})
    assert failed.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": failed.value.body["error"]["message"]},  # type: ignore[index]
    }
    long: Any = {**GREEDY, "messages": [{"role": "user", "content": "a b c d " * 1000}]}
    with pytest.raises(anthropic.BadRequestError, match=r"too long: .* > 1024 maximum"):
        client.messages.create(**long)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    asked: Any = {**GREEDY, "messages": [{"role": "user", "content": [image]}]}
    with pytest.raises(anthropic.BadRequestError, match=r"is an image, and .* takes text only"):
        client.messages.create(**asked)


def fields(**body: Any) -> dict[str, Any]:
    given = openai_fields(msgspec.convert({"messages": HELLO, **body}, MessagesRequest))
    return {name: value for name, value in given.items() if value is not None}


def test_blocks_become_messages() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "ä"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "is_error": True}
    blocks = [{"type": "text", "text": "none", "cache_control": {"type": "ephemeral"}}]
    messages = [
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Well"},
                call,
            ],
        },
        {"role": "user", "content": [{**result, "content": blocks}, {"type": "text", "text": "?"}]},
    ]
    system = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert fields(messages=messages, system=system)["messages"] == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "content": "Well",
            "reasoning_content": "Hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"at": "ä"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: none", "name": "look"},
        {"role": "user", "content": "?"},
    ]


def test_text_before_a_tool_s_result_stays_before_it() -> None:
    text, result = {"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "t"}
    content = [text, text, {**result, "content": "b"}, text]
    assert fields(messages=[{"role": "user", "content": content}])["messages"] == [
        {"role": "user", "content": "a\na"},
        {"role": "tool", "tool_call_id": "t", "content": "b"},
        {"role": "user", "content": "a"},
    ]


def test_max_tokens_is_needed(http: httpx2.Client) -> None:
    refused = http.post("/v1/messages", json={"messages": HELLO})
    assert refused.status_code == 400
    assert "max_tokens is missing" in refused.json()["error"]["message"]


def test_tools_and_choices_and_thinking_are_openai_s() -> None:
    schema = {"type": "object", "properties": {"at": {"type": "string"}}}
    tools = [{"name": "look", "description": "Looks.", "input_schema": schema}]
    function = {"name": "look", "description": "Looks.", "parameters": schema}
    found = fields(tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert found["tools"] == [{"type": "function", "function": function}]
    assert found["tool_choice"] == "required"
    assert found["parallel_tool_calls"] is False
    named = fields(tools=tools, tool_choice={"type": "tool", "name": "look"})["tool_choice"]
    assert named == {"type": "function", "function": {"name": "look"}}
    assert fields(tools=tools)["tool_choice"] == "auto"
    (strict,) = fields(tools=[{**tools[0], "strict": True}])["tools"]
    assert strict["function"] == {**function, "strict": True}
    for kind, thinks in (("enabled", True), ("adaptive", True), ("disabled", False)):
        asked = fields(thinking={"type": kind, "budget_tokens": 1024})
        assert asked["chat_template_kwargs"] == {"enable_thinking": thinks}
    form = {"type": "json_schema", "schema": schema}
    config = fields(output_config={"effort": "low", "format": form})
    assert config["reasoning_effort"] == "low"
    assert config["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "cannot run"),
        ({"tools": [{"name": "x"}], "tool_choice": {"type": "all"}}, "give auto, any"),
        ({"thinking": {"type": "long"}}, 'thinking.type is "long"'),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'role is "robot"'),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content is 3; give a text, or a list of blocks",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is "),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": 3}],
                    }
                ]
            },
            "content is 3; give a text",
        ),
        ({"container": "c"}, "container is not supported"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"output_config": {"format": {"type": "xml"}}}, "may only be of type json_schema"),
    ],
)
def test_what_is_not_served_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        fields(**body)
    assert message in refused.value.message


def test_thoughts_texts_and_calls_are_blocks(call_of_tool: Any) -> None:
    blocks = _Blocks(shows_thinking=True)
    pieces = [
        Piece(reasoning="Hm"),
        Piece(reasoning="m"),
        Piece(content="Well", calls=(call_of_tool,)),
    ]
    events = [one for piece in pieces for one in blocks.add(piece)] + [*blocks.end()]
    assert [one["type"].removeprefix("content_block_") for one in events] == [
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        *("start", "delta", "stop"),
    ]
    assert [one["index"] for one in events] == [0] * 5 + [1] * 3 + [2] * 3
    assert events[3]["delta"]["type"] == "signature_delta"
    assert events[8]["content_block"] == {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    assert events[9]["delta"] == {"type": "input_json_delta", "partial_json": '{"a": 1}'}
    assert blocks.content == [
        {"type": "thinking", "thinking": "Hmm", "signature": "unsigned"},
        {"type": "text", "text": "Well"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
    ]
    hidden = _Blocks(shows_thinking=False)
    assert all("thinking_delta" not in str(one) for one in hidden.add(pieces[0]))


async def test_a_call_of_a_tool_ends_the_message(call_of_tool: Any) -> None:
    lines = await _streamed(Said(Piece(content="Well"), Piece(calls=(call_of_tool,))))
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert data[0]["message"]["content"] == []
    assert data[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == 2
    assert data[-1] == {"type": "message_stop"}
    cut = Said(Piece(calls=(call_of_tool,)))
    cut.finish_reason = FinishReason.LENGTH
    assert '"stop_reason":"max_tokens"' in "".join(await _streamed(cut))


async def test_a_stream_that_breaks_ends_with_the_error() -> None:
    lines = await _streamed(Said(Piece(content="Well"), error=ApiError(503, "It broke.")))
    assert lines[-3] == "event: error"
    assert json.loads(lines[-2][6:]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "It broke."},
    }
    assert "event: message_stop" not in lines


async def _streamed(said: Any) -> list[str]:
    message = _Message(said, MessagesRequest(messages=HELLO))
    return await streamed(message.events("user"), _error_events)

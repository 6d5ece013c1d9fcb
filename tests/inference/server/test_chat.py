"""Chats in the template that the server was given."""

from typing import Any

import httpx2
import pytest

from tests.inference.server.events import stream, text_of

MESSAGES = [{"role": "user", "content": "Hello"}]
GREEDY = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}


def chat(http: httpx2.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_continues_the_template(http: httpx2.Client) -> None:
    answer = chat(http, **GREEDY)
    rendered = "<user>Hello</user><assistant>"
    completion = http.post(
        "/v1/completions", json={"prompt": rendered, "max_tokens": 6, "temperature": 0}
    ).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == completion["choices"][0]["text"]
    assert message["role"] == "assistant"
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(http: httpx2.Client) -> None:
    events = stream(http, "/v1/chat/completions", GREEDY)
    deltas = [event["choices"][0] for event in events]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert deltas[-1]["delta"] == {}
    assert [one["finish_reason"] for one in deltas] == [None] * 7 + ["length"]
    assert text_of(events) == chat(http, **GREEDY)["choices"][0]["message"]["content"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/chat/completions", GREEDY), ("/v1/completions", {"prompt": "a"})]
)
def test_a_stream_counts_tokens_if_asked(
    path: str, asked: dict[str, Any], http: httpx2.Client
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(
        http, path, {**asked, "max_tokens": 3, "ignore_eos": True, "stream_options": options}
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert {*counts} >= {1, 2, 3}


def test_parts_roles_and_the_last_message_continued(http: httpx2.Client) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = {**GREEDY, "messages": [{"role": "developer", "content": parts}]}
    joined = {**GREEDY, "messages": [{"role": "system", "content": "Hel\nlo"}]}
    assert _text(http, asked) == _text(http, joined)
    begun = [*MESSAGES, {"role": "assistant", "content": "def"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    continued = _text(http, {**GREEDY, "messages": begun, **goes_on})
    completion = {"prompt": "<user>Hello</user><assistant>def", "max_tokens": 6, "temperature": 0}
    answer = http.post("/v1/completions", json=completion).json()
    assert continued == answer["choices"][0]["text"]


def test_logprobs_have_bytes_and_the_likeliest(http: httpx2.Client) -> None:
    found = chat(http, **GREEDY, logprobs=True, top_logprobs=2)["choices"][0]
    content = found["logprobs"]["content"]
    assert len(content) == 6
    joined = b"".join(bytes(one["bytes"]) for one in content)
    assert joined.decode() == found["message"]["content"]
    for one in content:
        assert one["top_logprobs"][0]["logprob"] == one["logprob"]
        assert len(one["top_logprobs"]) == 2
    events = stream(http, "/v1/chat/completions", {**GREEDY, "logprobs": True, "top_logprobs": 2})
    streamed = [
        one
        for event in events
        for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({}, "messages is missing; give it."),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'messages[0].role is "robot"'),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content is 3; give a text, or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is an image, and ",
        ),
        ({"messages": MESSAGES, "continue_final_message": True}, "exclude each other"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": MESSAGES, "echo": True}, "echo is not supported for chats"),
        ({"messages": MESSAGES, "modalities": ["audio"]}, "modalities may only be text"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "start it with --request-templates"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    http: httpx2.Client, body: dict[str, Any], message: str
) -> None:
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"].replace("`", "")


def _text(http: httpx2.Client, body: dict[str, Any]) -> str:
    answer: str = chat(http, **body)["choices"][0]["message"]["content"]
    return answer

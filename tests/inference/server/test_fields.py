"""No field of a request is ignored in silence."""

from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from expertd_inference.server.api.anthropic_request import MessagesRequest
from expertd_inference.server.api.chat import ChatRequest
from expertd_inference.server.api.completions import CompletionRequest
from expertd_inference.server.api.ollama_request import OllamaChatRequest, OllamaGenerateRequest
from expertd_inference.server.api.responses_request import ResponsesRequest
from expertd_testing.server import Server
from tests.inference.server.events import stream

PAGE = Path(__file__).parents[3] / "docs/interfaces.md"
KINDS = [
    *(ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest),
    *(OllamaChatRequest, OllamaGenerateRequest),
]
MESSAGES = [{"role": "user", "content": "Once upon a"}]
CHAT = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_page_has_every_field(kind: type[msgspec.Struct]) -> None:
    page = PAGE.read_text()
    names = {field.name for field in msgspec.structs.fields(kind)} - {"model"}
    assert {name for name in names if f"`{name}`" not in page and f"`{name}:" not in page} == set()


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        (
            "/v1/chat/completions",
            {
                "surprise": 1,
                "user": "me",
                "store": False,
                "stream_options": {"include_obfuscation": True, "colour": "red"},
                "response_format": {"type": "text", "indent": 2},
            },
            [
                "the field 'surprise' is not known, and changes nothing",
                "the field 'user' changes nothing here",
                "the field 'stream_options.include_obfuscation' changes nothing here",
                "the field 'stream_options.colour' is not known, and changes nothing",
                "the field 'response_format.indent' is not known, and changes nothing",
            ],
        ),
        (
            "/v1/responses",
            {
                "input": "Once",
                "service_tier": "auto",
                "include": ["reasoning.encrypted_content"],
                "reasoning": {"summary": "auto"},
            },
            [
                "the field 'service_tier' changes nothing here",
                "include of 'reasoning.encrypted_content' changes nothing here",
                "the field 'reasoning.summary' changes nothing here",
            ],
        ),
        (
            "/v1/messages",
            {"metadata": {"user_id": "x"}, "thinking": {"type": "enabled", "budget_tokens": 9}},
            [
                "the field 'metadata' changes nothing here",
                "the field 'thinking.budget_tokens' changes nothing here",
            ],
        ),
        (
            "/api/chat",
            {"model": "example", "keep_alive": "5m", "options": {"num_ctx": 9, "num_predict": 2}},
            [
                "the field 'keep_alive' changes nothing here",
                "the field 'options.num_ctx' is not known, and changes nothing",
            ],
        ),
    ],
    ids=["chat", "responses", "messages", "ollama"],
)
def test_the_log_names_once_what_has_no_effect(
    path: str, fields: dict[str, Any], said: list[str], http: httpx2.Client, server: Server
) -> None:
    body = {**({} if "input" in fields else CHAT), **fields}
    if "input" in fields:
        body["max_output_tokens"] = 2
    for _ in range(2):
        response = http.post(path, json=body)
        assert response.status_code == 200, response.text
    for line in said:
        assert server.log.count(f"{path}: {line}\n") == 1, line
    assert "'store' changes" not in server.log


def test_a_chat_has_what_vllm_tells_of_tokens(http: httpx2.Client) -> None:
    asked = {**CHAT, "return_token_ids": True, "prompt_logprobs": 1, "n": 2}
    answer = http.post("/v1/chat/completions", json=asked).json()
    prompt = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert answer["prompt_token_ids"] == prompt
    known = answer["prompt_logprobs"]
    assert known[0] is None
    assert len(known) == len(prompt)
    for token, place in zip(prompt[1:], known[1:], strict=True):
        assert place[str(token)]["logprob"] <= 0
        assert 1 in [one["rank"] for one in place.values()]
    (first, second) = answer["choices"]
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) == 4
    assert "stop_reason" not in first

    events = stream(http, "/v1/chat/completions", asked)
    assert events[0]["prompt_token_ids"] == prompt
    assert events[0]["prompt_logprobs"] == known
    for name in ("prompt_token_ids", "prompt_logprobs"):
        assert all(name not in one for one in events[1:])
    choices = [one["choices"][0] for one in events]
    for index in range(2):
        ids = [one.get("token_ids", []) for one in choices if one["index"] == index]
        assert [one for some in ids for one in some] == first["token_ids"]

    plain = http.post("/v1/chat/completions", json=CHAT).json()
    assert "prompt_logprobs" not in plain
    assert "prompt_token_ids" not in plain


def test_a_chat_says_what_stopped_it(http: httpx2.Client) -> None:
    ids = http.post("/v1/chat/completions", json={**CHAT, "return_token_ids": True}).json()
    third = ids["choices"][0]["token_ids"][2]
    by_token = {**CHAT, "stop_token_ids": [third]}
    (choice,) = http.post("/v1/chat/completions", json=by_token).json()["choices"]
    assert (choice["stop_reason"], choice["finish_reason"]) == (third, "stop")
    events = stream(http, "/v1/chat/completions", by_token)
    assert events[-1]["choices"][0]["stop_reason"] == third
    text = ids["choices"][0]["message"]["content"].strip()[:2]
    (choice,) = http.post("/v1/chat/completions", json={**CHAT, "stop": text}).json()["choices"]
    assert choice["stop_reason"] == text


def test_the_input_of_a_response(http: httpx2.Client) -> None:
    given = [
        {"role": "user", "content": "Once"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]
    asked = {"input": given, "max_output_tokens": 2}
    id_ = http.post("/v1/responses", json=asked).json()["id"]
    path = f"/v1/responses/{id_}/input_items"
    page = http.get(path, params={"order": "asc"}).json()
    assert [item["type"] for item in page["data"]] == [
        *("message", "function_call", "function_call_output"),
    ]
    assert page["data"][0]["content"] == [{"type": "input_text", "text": "Once"}]
    assert not page["has_more"]
    newest_first = http.get(path).json()
    assert newest_first["data"] == page["data"][::-1]
    assert newest_first["first_id"] == page["data"][-1]["id"]
    second = http.get(path, params={"order": "asc", "limit": 1, "after": page["first_id"]}).json()
    assert second["data"] == page["data"][1:2]
    assert second["has_more"]
    for wrong in ({"limit": 0}, {"limit": "x"}, {"after": "none"}):
        assert http.get(path, params=wrong).status_code == 400
    assert http.get("/v1/responses/resp_none/input_items").status_code == 404


def test_responses_take_the_fields_of_vllm(http: httpx2.Client) -> None:
    asked = {
        "input": "Once upon a time",
        "max_output_tokens": 4,
        "seed": 3,
        "top_k": 1,
        "priority": 5,
    }
    first, second = (
        http.post("/v1/responses", json={**asked, "seed": seed}).json()["output"] for seed in (3, 4)
    )
    texts = [one[0]["content"][0]["text"] for one in (first, second)]
    assert texts[0] == texts[1], "of one token there is no choice"
    wrong = http.post("/v1/responses", json={**asked, "priority": "high"})
    assert wrong.status_code == 400

"""Every interface says what is wrong in its own form."""

from typing import Any

import httpx2
import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/responses/input_tokens": {"input": "Hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"model": "example", "messages": MESSAGES},
    "/api/generate": {"model": "example", "prompt": "Hello"},
    "/api/show": {"model": "example"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1]},
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
ANSWERING = (*STREAMED, "/api/chat", "/api/generate")
KINDS = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large"}


def check(path: str, response: httpx2.Response, status: int) -> str:
    """The message of an error in the interface's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    if path.startswith("/v1/messages"):
        assert body.keys() == {"type", "error"}
        assert body["type"] == "error"
        assert body["error"].keys() == {"type", "message"}
        assert body["error"]["type"] == KINDS.get(status, "invalid_request_error")
        message = body["error"]["message"]
    elif path.startswith("/api/"):
        assert body.keys() == {"error"}
        message = body["error"]
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() >= {"message", "type", "param", "code"}
        message = body["error"]["message"]
    assert message
    assert "\n" not in message
    assert "Traceback" not in message
    text: str = message
    return text


@pytest.mark.parametrize("path", BODIES)
def test_what_is_no_request(path: str, http: httpx2.Client) -> None:
    assert "not JSON" in check(path, http.post(path, content=b"{"), 400)
    assert "not a JSON object" in check(path, http.post(path, content=b"[]"), 400)
    check(path, http.put(path), 405)
    wrong = {name: {"x": object.__name__} for name in BODIES[path]}
    assert "Expected" in check(path, http.post(path, json=wrong), 400)


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_is_not_there(path: str, http: httpx2.Client) -> None:
    body = {**BODIES[path], "model": "gone"}
    assert "There is no model 'gone'" in check(path, http.post(path, json=body), 404)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", ANSWERING)
def test_what_cannot_be_answered(path: str, streamed: bool, http: httpx2.Client) -> None:
    long = "Hello " * 20_000
    body: dict[str, Any] = {**BODIES[path], "stream": streamed}
    for name, value in (("messages", [{"role": "user", "content": long}]), ("input", long)):
        if name in body:
            body[name] = value
    if "prompt" in body:
        body["prompt"] = long
    message = check(path, http.post(path, json=body), 400)
    assert "maximum" in message
    body = {**BODIES[path], "stream": streamed}
    wrong = {"options": {"temperature": -1}} if path.startswith("/api/") else {"temperature": -1}
    message = check(path, http.post(path, json={**body, **wrong}), 400)
    assert "temperature is -1" in message


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/v1/chat/completions", {"functions": []}, "old form of tools"),
        ("/v1/completions", {"suffix": "x"}, "suffix is not supported"),
        ("/v1/responses", {"background": True}, "background is not supported"),
        ("/v1/responses", {"previous_response_id": "resp_x"}, "no response 'resp_x'"),
        ("/v1/messages", {"container": "x"}, "container is not supported"),
        ("/v1/messages", {"tool_choice": {"type": "any"}, "tools": []}, "there are no tools"),
        ("/api/generate", {"suffix": "x"}, "suffix is not supported"),
        ("/api/chat", {"options": {"mirostat": 1}}, "options.mirostat is not supported"),
        ("/api/chat", {"format": "xml"}, "give json or a schema"),
    ],
)
def test_what_is_not_done_here(
    path: str, fields: dict[str, Any], words: str, http: httpx2.Client
) -> None:
    response = http.post(path, json={**BODIES[path], **fields})
    assert words in check(path, response, response.status_code)
    assert response.status_code in (400, 404)


def test_paths_that_are_several_interfaces(http: httpx2.Client) -> None:
    path = "/v1/models/gone"
    check(path, http.get(path), 404)
    version = {"anthropic-version": "2023-06-01"}
    check("/v1/messages", http.get(path, headers=version), 404)
    check("/api/none", http.post("/api/none"), 404)
    check("/api/embed", http.post("/api/embed"), 501)
    check("/v1/responses", http.post("/v1/responses/compact", json={}), 501)


SCHEMA = {"$ref": "#"}
FORMAT = {"type": "json_schema", "name": "x", "schema": SCHEMA}
TOOL: dict[str, Any] = {"name": "look", "parameters": {"type": "array"}}
CALL = {"tool_choice": "required"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"stop_token_ids": [9999]}, "stop_token_ids"),
        ("/v1/chat/completions", {**CALL, "tools": [{"type": "x"}]}, "tools[0].type"),
        ("/v1/chat/completions", {"messages": [{"role": "x"}]}, 'messages[0].role is "x"'),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": 5}]},
            "messages[0].tool_calls is 5; give a list of calls",
        ),
        (
            "/v1/chat/completions",
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs has 'messages', which the server gives",
        ),
        (
            "/api/chat",
            {"messages": [{"role": "assistant", "tool_calls": 5}]},
            "messages[0].tool_calls is 5; give a list of calls",
        ),
        ("/v1/messages", {"messages": [{"role": None}]}, "messages[0].role is null; give user"),
        ("/completion", {"prompt": None}, "prompt: Expected"),
        ("/infill", {"input_prefix": "a"}, "input_suffix is missing; give it."),
        (
            "/v1/messages",
            {"tools": [{"name": "f"}, {"name": "f"}]},
            "tools[1].name is 'f', as is that of tools[0]; give each tool a name of its own.",
        ),
        ("/v1/completions", {"allowed_token_ids": [9999]}, "allowed_token_ids"),
        ("/v1/completions", {"min_tokens": 17}, "min_tokens"),
        ("/v1/responses", {"max_output_tokens": 0}, "max_output_tokens"),
        ("/v1/responses", {"top_logprobs": 21}, "top_logprobs"),
        ("/v1/responses", {"text": {"format": FORMAT}}, "text.format"),
        (
            "/v1/responses",
            {**CALL, "tools": [{"type": "function", **TOOL}]},
            "tools[0].parameters",
        ),
        ("/v1/responses", {"input": [{"role": "x", "content": "a"}]}, "input[0].role"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ("/v1/messages", {"stop_sequences": [""]}, "stop_sequences"),
        (
            "/v1/messages",
            {"tool_choice": {"type": "any"}, "tools": [{"name": "f", "input_schema": SCHEMA}]},
            "tools[0].input_schema",
        ),
        ("/v1/messages", {"output_config": {"format": FORMAT}}, "output_config.format"),
        ("/v1/messages", {"output_config": {"effort": 1}}, "output_config.effort"),
        ("/api/chat", {"options": {"num_predict": 0}}, "options.num_predict"),
        ("/api/chat", {"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        ("/api/chat", {"options": {"stop": [""]}}, "options.stop"),
        ("/api/chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/api/generate", {"format": SCHEMA}, "format"),
        ("/completion", {"n_predict": 0}, "n_predict"),
        ("/completion", {"max_tokens": 0}, "max_tokens"),
        ("/completion", {"repeat_penalty": 0}, "repeat_penalty"),
        ("/completion", {"n_probs": 21}, "n_probs"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_the_field_is_named_as_the_client_named_it(
    path: str, fields: dict[str, Any], param: str, streamed: bool, http: httpx2.Client
) -> None:
    body = {**BODIES.get(path, {"prompt": "Hello"}), **fields, "stream": streamed}
    response = http.post(path, json=body)
    assert check(path, response, 400).startswith(param)
    if not path.startswith(("/v1/messages", "/api/")):
        assert param.startswith(response.json()["error"]["param"])


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/responses", "input"),
    ],
)
def test_where_a_prompt_is_that_is_too_long(path: str, param: str, http: httpx2.Client) -> None:
    long = "Hello " * 2000
    content = [{"role": "user", "content": long}] if param == "messages" else long
    error = http.post(path, json={**BODIES[path], param: content}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (rb'{"prompt": "\ud83d\ude00 \ud800"}', r"has \ud800 (byte 25), which is one half"),
        (rb'{"prompt": "\\ud800 \uDC00"}', r"has \uDC00 (byte 20), which is one half"),
        (rb'{"prompt": "\ud800\ud800"}', r"has \ud800 (byte 12), which is one half"),
        (b'{"prompt": "\xff"}', "not JSON: its byte 12 is not UTF-8"),
        (b'{"prompt": 1e999}', "not JSON: Number out of range."),
        (rb'{"prompt": "\ude"}', "not JSON"),
    ],
)
def test_what_is_no_text(body: bytes, words: str, http: httpx2.Client) -> None:
    assert words in check("/v1/completions", http.post("/v1/completions", content=body), 400)


@pytest.mark.parametrize("path", ANSWERING)
def test_more_experts_than_routers_choose(path: str, http: httpx2.Client) -> None:
    body = {**BODIES[path], "stream": False}
    for field, value, said in (
        ("experts_per_token", 3, "is 3, and this model's routers choose 2; give 1 to 2."),
        ("expert_threshold", -1, "is -1.0; give 0 to 1, a share of a token's router weights."),
    ):
        asked = {"options": {field: value}} if path.startswith("/api/") else {field: value}
        name = f"options.{field}" if path.startswith("/api/") else field
        message = check(path, http.post(path, json={**body, **asked}), 400)
        assert message == f"{name} {said}"

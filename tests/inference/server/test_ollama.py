"""Ollama's interface, by its own client and by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import ollama
import pytest

from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.ollama import LINES, _Answer, _error_lines
from expertd_inference.server.api.ollama_models import _read
from expertd_inference.server.api.ollama_request import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    chat_fields,
    generate_fields,
)
from expertd_inference.server.chat.answer import Piece
from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import RecitedModel, make_tokenizer, reciting_client
from expertd_testing.server import Server
from expertstore.errors import PackError
from tests.inference.server.said import Said, streamed

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"temperature": 0, "num_predict": 6, "num_ctx": 512}


@pytest.fixture
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as made:
        yield made


def greedy_text(http: httpx2.Client, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
    text: str = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_a_chat_whole_and_streamed(client: ollama.Client, http: httpx2.Client) -> None:
    answer = client.chat("example:latest", messages=HELLO, options=GREEDY)
    assert answer.message.content == greedy_text(http, "<user>Hello</user><assistant>")
    assert answer.done_reason == "length"
    assert answer.eval_count == 6
    parts = list(client.chat("example", messages=HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == answer.message.content
    assert [part.done for part in parts] == [False] * 6 + [True]
    last = parts[-1]
    assert last.total_duration is not None
    assert last.prompt_eval_duration is not None
    assert last.eval_duration is not None
    assert last.total_duration >= last.prompt_eval_duration + last.eval_duration > 0


def test_a_stream_is_the_default_and_lines_of_json(http: httpx2.Client) -> None:
    body = {"model": "example", "messages": HELLO, "options": GREEDY, "logprobs": True}
    response = http.post("/api/chat", json={**body, "top_logprobs": 2})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) == 7
    assert [len(line["logprobs"][0]["top_logprobs"]) for line in lines[:-1]] == [2] * 6
    assert {line["model"] for line in lines} == {"example"}


def test_generate_asks_by_the_template_or_raw(client: ollama.Client, http: httpx2.Client) -> None:
    answer = client.generate("example", "Hello", system="Be brief.", options=GREEDY)
    chat = "<system>Be brief.</system><user>Hello</user><assistant>"
    assert answer.response == greedy_text(http, chat)
    raw = client.generate("example", "def read(", raw=True, options=GREEDY)
    assert raw.response == greedy_text(http, "def read(")
    parts = list(client.generate("example", "def read(", raw=True, options=GREEDY, stream=True))
    assert "".join(part.response or "" for part in parts) == raw.response


def test_models_are_listed_shown_and_running(client: ollama.Client) -> None:
    client.generate("example", "")  # Which loads it.
    listed = {model.model: model for model in client.list().models}
    assert listed.keys() >= {"example:latest", "alias:latest", "brief:latest"}
    details = listed["alias:latest"].details
    assert details is not None
    assert (details.family, details.quantization_level) == ("mixtral", "4bit")
    shown = client.show("example")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "mixtral"
    assert shown.modelinfo["mixtral.context_length"] == 1024
    assert shown.capabilities == ["completion"]
    assert [model.model for model in client.ps().models] == ["example:latest"]


def test_errors_are_a_sentence(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="There is no model 'other'") as failed:
        client.chat("other", messages=HELLO)
    assert failed.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="do not embed texts") as failed:
        client.embed("example", "text")
    assert failed.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="when they are idle"):
        client.generate("example", "", keep_alive=0)
    with pytest.raises(ollama.ResponseError, match="mirostat is not supported"):
        list(client.chat("example", messages=HELLO, options={"mirostat": 1}, stream=True))


def test_the_version_is_told(http: httpx2.Client) -> None:
    assert http.get("/api/version").json() == http.get("/version").json()


def chat(**body: Any) -> dict[str, Any]:
    asked = msgspec.convert({"model": "m:latest", "messages": HELLO, **body}, OllamaChatRequest)
    return {name: value for name, value in chat_fields(asked).items() if value is not None}


def test_calls_and_results_are_matched() -> None:
    look, hear = ({"function": {"name": name, "arguments": {}}} for name in ("look", "hear"))
    messages = [
        {"role": "assistant", "content": "", "thinking": "Hm", "tool_calls": [look, hear]},
        {"role": "tool", "tool_name": "hear", "content": "noise"},
        {"role": "tool", "content": "light"},
    ]
    calls = [
        {"id": "call_0", "type": "function", **look},
        {"id": "call_1", "type": "function", **hear},
    ]
    assert chat(messages=messages)["messages"] == [
        {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "content": "noise", "tool_call_id": "call_1", "name": "hear"},
        {"role": "tool", "content": "light", "tool_call_id": "call_0", "name": "look"},
    ]


def test_options_formats_and_thinking_are_openai_s() -> None:
    options = {"num_predict": -1, "top_k": 3, "repeat_penalty": 1.1, "stop": ["x"], "numa": True}
    assert chat(options=options) == {
        "model": "m",
        "messages": HELLO,
        "top_k": 3,
        "repetition_penalty": 1.1,
        "stop": ["x"],
    }
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    schema = chat(format={"type": "object"})["response_format"]["json_schema"]
    assert schema["schema"] == {"type": "object"}
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat(think="low")["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"options": {"typical_p": 0.5}}, "options.typical_p is not supported"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "may only be -1"),
        ({"format": "xml"}, "format is 'xml'"),
        ({"messages": [{"role": "user", "images": "x"}]}, "messages[0].images is"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "without a function"),
    ],
)
def test_what_is_not_served_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**body)
    assert message in refused.value.message


def test_what_generate_does_not_do_is_refused() -> None:
    asked = OllamaGenerateRequest(model="m", prompt="x", template="y")
    with pytest.raises(ApiError, match="template is not supported"):
        generate_fields(asked)


async def test_thoughts_and_calls_are_parts_of_a_message(call_of_tool: Any) -> None:
    said = Said(Piece(reasoning="Hm"), Piece(content="Well", calls=(call_of_tool,)))
    message = (await _answer(said).whole("user"))["message"]
    assert message == {
        "role": "assistant",
        "content": "Well",
        "thinking": "Hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    }


async def test_a_stream_that_breaks_ends_with_the_error() -> None:
    said = Said(Piece(content="Well"), error=ApiError(503, "It broke."))
    lines = await streamed(_answer(said).lines("user"), _error_lines, LINES, None)
    assert [json.loads(line).get("done") for line in lines] == [False, None]
    assert json.loads(lines[-1]) == {"error": "It broke."}


def _answer(said: Any) -> _Answer:
    return _Answer(said, OllamaChatRequest(model="m"), is_chat=True)


def test_a_gap_needs_a_model_with_tokens_for_gaps(http: httpx2.Client) -> None:
    body = {"model": "example", "prompt": "def f(", "suffix": "return x"}
    response = http.post("/api/generate", json=body)
    assert response.status_code == 400
    assert "example has no tokens for filling gaps" in response.json()["error"]


def test_a_model_is_loaded_and_shown(http: httpx2.Client, tmp_path: Path) -> None:
    loaded = http.post("/api/chat", json={"model": "example", "stream": False}).json()
    assert loaded["message"] == {"role": "assistant", "content": ""}
    assert loaded["done_reason"] == "load"
    refused = http.post("/api/show", json={})
    assert (refused.status_code, refused.json()["error"]) == (400, "model is missing; name one.")
    for name, capabilities in (("example", ["completion"]), ("thinks", ["completion", "thinking"])):
        shown = http.post("/api/show", json={"model": name}).json()
        assert shown["capabilities"] == capabilities
    with pytest.raises(PackError, match=r"none cannot be read: No such file"):
        _read(tmp_path / "none")


async def test_a_template_shows_what_a_model_can_do(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    model = RecitedModel(ModelText("recited", tmp_path, "{{ tools }}{{ enable_thinking }}"))
    for name in ("config.json", "pack.json"):
        (tmp_path / name).write_text("{}")
    async with reciting_client(tmp_path, model) as client:
        shown = (await client.post("/api/show", json={"name": "recited"})).raise_for_status()
    assert shown.json()["capabilities"] == ["completion", "tools", "thinking"]

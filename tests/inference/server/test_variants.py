"""Names under which a model has other defaults."""

from pathlib import Path
from typing import Any

import httpx2
import pytest

from expertd_inference.server.api.chat import ChatRequest
from expertd_inference.server.variants import Variant, read_variants
from expertstore.errors import ConfigError

MESSAGES = [{"role": "user", "content": "Once"}]
SYSTEM = "<system>Be brief.</system>"


def prompt(http: httpx2.Client, **body: Any) -> str:
    tokens = http.post("/tokenize", json={"messages": MESSAGES, **body}).json()["tokens"]
    text: str = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    return text


def test_they_are_listed_with_their_model(http: httpx2.Client) -> None:
    listed = {one["id"]: one for one in http.get("/v1/models").json()["data"]}
    variants = {"brief", "coder", "mistral", "gemma", "thinks"}
    assert listed.keys() == {"example", "alias", "short", *variants}
    assert [listed["brief"][name] for name in ("root", "parent")] == ["example", "example"]
    assert [listed["short"][name] for name in ("root", "parent")] == ["example", "brief"]
    assert [listed["example"][name] for name in ("root", "parent")] == ["example", None]
    assert http.get("/v1/models/brief").json() == listed["brief"]


def test_a_system_prompt_where_the_chat_has_none(http: httpx2.Client) -> None:
    assert prompt(http, model="brief").startswith(f"{SYSTEM}<user>")
    assert prompt(http, model="short").startswith(SYSTEM)
    assert SYSTEM not in prompt(http, model="example")
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be long."}, *MESSAGES]
        assert prompt(http, model="brief", messages=own).startswith("<system>Be long.</system>")


def test_a_chat_template(http: httpx2.Client) -> None:
    assert prompt(http, model="thinks").endswith("<assistant><think>")
    assert prompt(http, model="thinks") != prompt(http)
    info = http.get("/tokenizer_info", params={"model": "thinks"}).json()
    assert info["chat_template"].endswith("<think>\n")


@pytest.mark.parametrize(
    ("path", "body", "limit", "count"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, "max_completion_tokens", "usage"),
        ("/v1/completions", {"prompt": "Once"}, "max_tokens", "usage"),
        ("/v1/responses", {"input": "Once"}, "max_output_tokens", "usage"),
    ],
)
def test_values_count_where_a_request_says_nothing(
    path: str, body: dict[str, Any], limit: str, count: str, http: httpx2.Client
) -> None:
    def asked(**more: Any) -> dict[str, Any]:
        response = http.post(path, json={"model": "brief", **body, **more})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert answer["model"] == "brief"
        return answer

    def num_tokens(answer: dict[str, Any]) -> int:
        usage = answer[count]
        num: int = usage.get("completion_tokens") or usage.get("output_tokens")
        return num

    first, second = asked(), asked()
    assert num_tokens(first) == 3
    assert num_tokens(asked(**{limit: 2})) == 2
    name = "output" if "output" in first else "choices"
    if name == "choices":
        assert first[name] == second[name], "temperature 0"
    else:
        assert first["temperature"] == 0


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ({}, {"enable_thinking": False, "a": 1}),
        ({"chat_template_kwargs": {"a": 2, "b": 3}}, {"enable_thinking": False, "a": 2, "b": 3}),
        ({"reasoning_effort": "high"}, {"a": 1}),
    ],
)
def test_a_template_s_arguments(asked: dict[str, Any], arguments: dict[str, Any]) -> None:
    body = ChatRequest(messages=[], **asked)
    variant = Variant(
        chat_template_kwargs={"enable_thinking": False, "a": 1}, reasoning_effort="low"
    )
    body.fill(variant)
    assert body.chat_template_kwargs == arguments
    assert body.reasoning_effort == asked.get("reasoning_effort", "low")
    assert variant.chat_template_kwargs == {"enable_thinking": False, "a": 1}


def test_other_interfaces(http: httpx2.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2}
    counts = [
        http.post("/v1/messages/count_tokens", json={**body, "model": model}).json()["input_tokens"]
        for model in ("example", "brief")
    ]
    assert counts[1] > counts[0]
    answer = http.post(
        "/api/chat", json={"model": "brief:latest", "messages": MESSAGES, "stream": False}
    ).json()
    assert answer["eval_count"] == 3
    assert answer["prompt_eval_count"] == counts[1]


def test_of_a_model_that_is_not_there(http: httpx2.Client) -> None:
    response = http.post("/v1/completions", json={"model": "orphan", "prompt": "Once"})
    assert response.status_code == 404
    assert "There is no model 'orphan'" in response.json()["error"]["message"]


def test_a_file_of_them(variants: Path) -> None:
    assert read_variants(None) == {}
    found = read_variants(variants)
    assert [*found] == ["brief", "coder", "mistral", "gemma", "thinks", "orphan"]
    assert found["brief"].sampling == {"temperature": 0, "max_tokens": 3, "stop": "~"}
    assert (found["thinks"].chat_template or "").endswith("<think>\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("variants", "The variants in"),
        ("[variant.x]", "unknown field"),
        ("[variants.x]\nlora = 1", "unknown field `lora` - at `$.variants"),
        ("[variants.x]\ntemperature = 'hot'", "Expected `float | null`"),
        ("[variants.x]\ntemperature = -1", "temperature is -1.0; give 0 to 100"),
        ("[variants.x]\nmax_tokens = 0", "give at least 1"),
        ("[variants.x]\nmodel = 'x'", "it has the name of its model"),
        ("[variants.x]\nchat_format = 'klingon'", "There is no chat format 'klingon'"),
        ("[variants.x]\nchat_template = 'none.jinja'", "No such file"),
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "variants.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_variants(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_variants(tmp_path / "none.toml")

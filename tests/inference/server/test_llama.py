"""What llama-server has of its own, as its clients ask for it."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import RecitedModel, make_tokenizer, reciting_client

PROMPT = "def read(path):\n"


def post(http: httpx2.Client, path: str = "/completion", **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(http: httpx2.Client, **body: Any) -> str:
    response = http.post("/completion", json={"prompt": PROMPT, "n_predict": 2, **body})
    assert response.status_code == 400, response.text
    message: str = response.json()["error"]["message"]
    return message


def greedy(http: httpx2.Client, prompt: Any = PROMPT, **body: Any) -> Any:
    return post(http, prompt=prompt, n_predict=6, temperature=0, **body)


def openai_text(http: httpx2.Client, prompt: Any, **more: Any) -> str:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
    text: str = post(http, "/v1/completions", **body)["choices"][0]["text"]
    return text


def test_a_text_is_continued(http: httpx2.Client) -> None:
    answer = greedy(http)
    assert answer["content"] == openai_text(http, PROMPT)
    assert (answer["stop"], answer["stop_type"], answer["truncated"]) == (True, "limit", False)
    assert answer["prompt"] == PROMPT
    assert answer["tokens"] == []
    assert answer["generation_settings"]["n_predict"] == 6
    timings = answer["timings"]
    assert timings["predicted_n"] == answer["tokens_predicted"] == 6
    assert timings["prompt_n"] + timings["cache_n"] == answer["tokens_evaluated"]
    assert timings["predicted_per_second"] == pytest.approx(5000 / timings["predicted_ms"])


def test_a_stream_is_the_same(http: httpx2.Client) -> None:
    body = {"prompt": PROMPT, "n_predict": 6, "temperature": 0, "stream": True}
    response = http.post("/completion", json={**body, "timings_per_token": True, "n_probs": 2})
    parts = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    whole = greedy(http, return_tokens=True)
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert [part["stop"] for part in parts] == [False] * 6 + [True]
    assert [part["timings"]["predicted_n"] for part in parts] == [*range(1, 7), 6]
    assert all(len(part["completion_probabilities"]) == 1 for part in parts[:-1])


def test_a_stop_is_named_and_newlines_are_noticed(http: httpx2.Client) -> None:
    text = greedy(http)["content"]
    stop = text[2:4]
    answer = greedy(http, stop=[stop])
    assert (answer["content"], answer["stop_type"]) == (text[: text.index(stop)], "word")
    assert answer["stopping_word"] == stop
    grammar = post(http, prompt=PROMPT, grammar='root ::= "a\\nb"', n_predict=9)
    assert (grammar["content"], grammar["stop_type"]) == ("a\nb", "eos")
    assert grammar["has_new_line"] is True


def test_prompts_are_texts_tokens_or_both(http: httpx2.Client) -> None:
    tokens = post(http, "/tokenize", content=PROMPT)["tokens"]
    content = greedy(http)["content"]
    several = greedy(http, [tokens, PROMPT, {"prompt_string": PROMPT}])
    assert [(one["index"], one["content"]) for one in several] == [
        (0, content), (1, content), (2, content)
    ]  # fmt: skip
    mixed = greedy(http, [PROMPT, tokens[0], "x"])
    assert mixed["prompt"] == f"{PROMPT}{greedy(http, tokens[:1])['prompt']}x"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is []; give at least one"),
        ([[]], "give a text, or a list of texts, tokens or prompts"),
        ([1, None], "give a text, or a list of texts, tokens or prompts"),
        ({"prompt_string": "a", "multimodal_data": ["x"]}, "multimodal_data is not supported"),
    ],
)
def test_other_prompts_are_refused(http: httpx2.Client, prompt: Any, message: str) -> None:
    assert message in refused(http, prompt=prompt)


def test_biases_are_of_tokens_or_of_texts(http: httpx2.Client) -> None:
    first = greedy(http, return_tokens=True)["tokens"][0]
    word = post(http, "/detokenize", tokens=[first])["content"]
    for biases in ([[first, -100]], [[first, False]], {str(first): -100}, [[word, -100]]):
        other = greedy(http, return_tokens=True, logit_bias=biases)
        assert other["tokens"][0] != first
        assert {one["token"] for one in other["generation_settings"]["logit_bias"]} == {first}
    assert "give a number" in refused(http, logit_bias=[[first, True]])
    assert "is no token" in refused(http, logit_bias={"1" * 5000: 1.0})
    arabic = greedy(http, logit_bias={"\u0661": 1.0})["generation_settings"]["logit_bias"]
    assert 1 not in {one["token"] for one in arabic}, "which is a text"


def test_probabilities_are_openai_s_with_ids(http: httpx2.Client) -> None:
    one = greedy(http, n_probs=3)["completion_probabilities"][0]
    openai = post(http, "/v1/completions", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=3)
    logprobs = openai["choices"][0]["logprobs"]
    assert [one["token"], one["logprob"]] == [
        logprobs["tokens"][0], pytest.approx(logprobs["token_logprobs"][0])
    ]  # fmt: skip
    assert one["top_logprobs"][0]["id"] == one["id"]
    assert len(one["top_logprobs"]) == 3


def test_only_some_fields_are_answered(http: httpx2.Client) -> None:
    fields = ["content", "generation_settings/n_predict", "timings/nothing"]
    answer = greedy(http, response_fields=fields)
    assert [*answer] == fields
    assert [*answer.values()][1:] == [6, None]
    body = {"prompt": PROMPT, "n_predict": 1, "stream": True, "response_fields": ["stop"]}
    assert http.post("/completion", json=body).text.endswith('data: {"stop":true}\n\n')


def test_of_several_prompts_one_may_be_wrong(http: httpx2.Client) -> None:
    assert "maximum context length is 1024" in refused(http, prompt=["a", [1] * 5000])


@pytest.mark.parametrize(
    "body",
    [{"mirostat": 2}, {"xtc_probability": 0.5}, {"lora": [{"id": 0}]}, {"return_progress": True}],
)
def test_what_would_change_something_is_refused(http: httpx2.Client, body: dict[str, Any]) -> None:
    assert f"{next(iter(body))} is not supported" in refused(http, **body)


def test_neutral_values_are_taken(http: httpx2.Client) -> None:
    neutral = {"typical_p": 1.0, "mirostat": 0, "repeat_penalty": 1.0, "samplers": ["top_k"]}
    more = {"repeat_last_n": 64, "seed": 0xFFFFFFFF, "cache_prompt": False, "dry_multiplier": 0}
    assert greedy(http, **neutral, **more)["content"] == greedy(http)["content"]
    texts = {post(http, prompt=PROMPT, n_predict=16, **more)["content"] for _ in range(3)}
    assert len(texts) > 1
    assert "repeat_last_n" in refused(http, repeat_penalty=1.1, repeat_last_n=64)


def test_a_stream_takes_one_prompt(http: httpx2.Client) -> None:
    assert "takes one prompt" in refused(http, prompt=["a", "b"], stream=True)


def test_a_chat_in_the_template(http: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert post(http, "/apply-template", **body) == {"prompt": "<user>Hi</user><assistant>"}
    without = post(http, "/apply-template", **body, add_generation_prompt=False)
    assert without == {"prompt": "<user>Hi</user>"}
    counted = post(http, "/v1/chat/completions/input_tokens", **body)
    assert counted == {"input_tokens": post(http, "/tokenize", **body)["count"]}


def test_properties_and_slots(http: httpx2.Client) -> None:
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert "message.content" in props["chat_template"]
    assert (props["model_alias"], props["total_slots"]) == ("example", 64)
    slots = http.get("/slots")
    assert slots.status_code == 501
    assert "/metrics" in slots.json()["error"]["message"]


def test_a_model_without_tokens_for_gaps_fills_none(http: httpx2.Client) -> None:
    body = {"input_prefix": "def f(", "input_suffix": "return x", "input_extra": [{"text": "a"}]}
    response = http.post("/infill", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input_suffix"
    assert "has no tokens for filling gaps" in response.json()["error"]["message"]


async def test_a_gap_is_filled(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    model = RecitedModel(ModelText("coder", tmp_path))
    model.recitals.append("x): ")
    body = {
        "input_prefix": "def f(",
        "input_suffix": "return x",
        "input_extra": [{"filename": "a.py", "text": "A"}],
        "prompt": "y, ",
    }
    async with reciting_client(tmp_path, model) as client:
        answer = (await client.post("/infill", json=body)).raise_for_status().json()
    assert answer["content"] == "x): "
    gap = "<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>y, "
    assert model.prompts == [f"A\n\n{gap}"]

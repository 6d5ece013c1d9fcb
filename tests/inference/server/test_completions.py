"""Completions, as openai-python, lm-eval and load generators ask for them."""

from typing import Any

import httpx2
import pytest

from tests.inference.server.events import stream, text_of

PROMPT = "def read_lines(path):\n"
GREEDY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


def complete(http: httpx2.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_has_openai_s_form(http: httpx2.Client) -> None:
    answer = complete(http, **GREEDY)
    choice = answer["choices"][0]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "example"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_a_stream_has_one_event_a_token_and_the_same_text(http: httpx2.Client) -> None:
    whole = complete(http, **GREEDY)
    events = stream(http, "/v1/completions", {**GREEDY, "stream_options": {"include_usage": True}})
    assert text_of(events) == whole["choices"][0]["text"]
    assert [len(event["choices"]) for event in events] == [1] * 8 + [0]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert all(event["usage"] is None for event in events[:-1])
    last = events[-1]["usage"]
    assert last["completion_tokens"] == 8
    assert len({event["id"] for event in events}) == 1


def test_texts_tokens_and_lists_of_both(http: httpx2.Client) -> None:
    tokens = [5, 6, 7]
    alone = [
        complete(http, **{**GREEDY, "prompt": prompt})["choices"][0]["text"]
        for prompt in (PROMPT, tokens)
    ]
    together = complete(http, **{**GREEDY, "prompt": [PROMPT, tokens]})
    assert [choice["text"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == [0, 1]


def test_several_choices_differ_by_their_number_and_repeat_by_seed(http: httpx2.Client) -> None:
    asked = {**GREEDY, "temperature": 1.0, "seed": -7, "n": 3}
    first, second = (complete(http, **asked) for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["text"] for choice in second["choices"]]
    events = stream(http, "/v1/completions", asked)
    assert [text_of(events, index) for index in range(3)] == texts
    assert first["usage"]["completion_tokens"] == 24


def test_echo_with_logprobs_as_lm_eval_reads_them(http: httpx2.Client) -> None:
    asked = {"prompt": [[40, 50, 60], [7, 8]], "max_tokens": 1, "logprobs": 1, "echo": True}
    choices = complete(http, **asked, temperature=0, seed=1234)["choices"]
    for choice, prompt in zip(choices, asked["prompt"], strict=True):  # type: ignore[call-overload]
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["text_offset"][0] == 0
        assert choice["text"] == "".join(found["tokens"])
        for name, value, top in zip(
            found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:],
            strict=True,
        ):  # fmt: skip
            assert top[name] == value
            assert max(top.values()) >= value
        # What was chosen greedily was the likeliest.
        assert max(found["top_logprobs"][-1].values()) == found["token_logprobs"][-1]


def test_echo_alone(http: httpx2.Client) -> None:
    answer = complete(http, prompt=PROMPT, max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == PROMPT


def test_a_stop_string_ends_the_text_before_it(http: httpx2.Client) -> None:
    whole = complete(http, **{**GREEDY, "max_tokens": 20})["choices"][0]["text"]
    stop = whole[6:9]
    cut = complete(http, **{**GREEDY, "max_tokens": 20}, stop=[stop, "never"])["choices"][0]
    assert cut["text"] == whole[: whole.find(stop)]
    assert cut["finish_reason"] == "stop"


def test_which_stop_it_was_is_told(http: httpx2.Client) -> None:
    whole = complete(http, **GREEDY, return_token_ids=True)["choices"][0]
    assert "stop_reason" not in whole
    stop = whole["text"][4:6]
    cut = complete(http, **GREEDY, stop=["never", stop])["choices"][0]
    assert cut["stop_reason"] == stop
    token = whole["token_ids"][3]
    cut = complete(http, **GREEDY, stop_token_ids=[token])["choices"][0]
    assert cut["stop_reason"] == token


def test_a_prompt_s_tokens_and_their_probabilities(http: httpx2.Client) -> None:
    asked = {**GREEDY, "prompt": [40, 50, 60], "prompt_logprobs": 2, "return_token_ids": True}
    choice = complete(http, **asked)["choices"][0]
    assert choice["prompt_token_ids"] == [40, 50, 60]
    first, *places = choice["prompt_logprobs"]
    assert first is None
    for token, place in zip((50, 60), places, strict=True):
        ranks = [one["rank"] for one in place.values()]
        assert ranks in ([1, 2], [1, 2, None])
        assert place[str(token)]["logprob"] <= max(one["logprob"] for one in place.values())
        assert place[str(token)]["decoded_token"]
    events = stream(http, "/v1/completions", asked)
    assert events[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert all("prompt_logprobs" not in event["choices"][0] for event in events[1:])
    # An echo has as many of the likeliest as it asks for.
    echo = complete(http, **asked, echo=True, logprobs=1)["choices"][0]
    assert echo["prompt_logprobs"] == choice["prompt_logprobs"]
    assert max(map(len, echo["logprobs"]["top_logprobs"][1:3])) == 2, "beside the prompt's own"
    assert echo["logprobs"]["token_logprobs"][1] == places[0]["50"]["logprob"]


def test_an_echo_alone_may_fill_the_context(http: httpx2.Client) -> None:
    most = http.get("/v1/models").json()["data"][0]["max_model_len"]
    asked = {"prompt": [5] * most, "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = complete(http, **asked)
    (choice,) = answer["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == most
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    events = stream(http, "/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["logprobs"] == choice["logprobs"]
    assert events[-1]["usage"] == answer["usage"]
    for wrong in ({"prompt": [5] * (most + 1)}, {"max_tokens": 1}):
        refused = http.post("/v1/completions", json={**asked, **wrong})
        assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_an_alias_is_the_model(http: httpx2.Client) -> None:
    assert complete(http, **GREEDY, model="alias")["model"] == "example"
    listed = http.get("/v1/models").json()["data"]
    assert {"example", "alias"} <= {model["id"] for model in listed}
    described = http.get("/v1/models/alias").json()
    assert described["root"] == "example"
    assert described["max_input_tokens"] == described["max_model_len"] - 1 == 1023


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "prompt is missing"),
        ({"prompt": []}, 400, "prompt is a list of 0; give 1 to 1024"),
        ({"prompt": ["a", 3]}, 400, "prompt mixes tokens and texts"),
        ({"prompt": ""}, 400, "The prompt is empty"),
        ({"prompt": [1 << 20]}, 400, "has token 1048576"),
        ({"prompt": "a", "model": "other"}, 404, "There is no model 'other'"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
        ({"prompt": "a", "top_p": 2}, 400, "top_p is 2"),
        ({"prompt": "a", "seed": "x"}, 400, "seed: Expected"),
        ({"prompt": "a", "n": 0}, 400, "n is 0"),
        ({"prompt": "a", "n": 2, "best_of": 3}, 400, "best_of is not supported"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
        ({"prompt": "a", "stop": [""]}, 400, "stop has an empty text"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs is 21; give 0 to 20"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias has the key 'x'; give tokens"),
        ({"prompt": "a", "logit_bias": {"9999999": 1}}, 400, "logit_bias has token 9999999"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": 2, "min_tokens": 3}, 400, "min_tokens is 3"),
        ({"prompt": "a", "timings_per_token": True}, 400, "timings_per_token is not supported"),
        ({"prompt": "a", "return_progress": True}, 400, "return_progress is not supported"),
        ({"prompt": "a", "prompt_embeds": "x"}, 400, "prompt_embeds is not supported"),
        ({"prompt": "a", "web_search_options": {}}, 400, "give a tool of your own"),
        ({"prompt": [1] * 5000}, 400, "maximum context length is 1024 tokens"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_answered_is_refused_in_openai_s_form(
    http: httpx2.Client, body: dict[str, Any], status: int, message: str, streamed: bool
) -> None:
    response = http.post("/v1/completions", json={**body, "stream": streamed})
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_has_the_code_that_agents_look_for(http: httpx2.Client) -> None:
    error = http.post("/v1/completions", json={"prompt": [1] * 5000}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (5000, 1024)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"prompt": "a", "prompt": '])
def test_a_body_that_is_no_json_object(http: httpx2.Client, content: bytes) -> None:
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_other_paths_and_methods(http: httpx2.Client) -> None:
    assert http.get("/v1/nothing").json()["error"]["message"].startswith("There is nothing at")
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]

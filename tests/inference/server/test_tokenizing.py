"""Tokens of texts and chats, and texts of tokens, for lm-eval and clients of llama-server."""

from typing import Any

import httpx2
import pytest

TEXT = "def read(path):\n"


def post(http: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_text_s_tokens_lead_back_to_it(http: httpx2.Client) -> None:
    answer = post(http, "/tokenize", model="example", prompt=TEXT, return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0
    back = post(http, "/detokenize", tokens=answer["tokens"])
    assert back == {"prompt": TEXT, "content": TEXT}
    assert post(http, "/v1/tokenize", content=TEXT) == {"tokens": answer["tokens"]}


def test_pieces_are_texts_or_bytes(http: httpx2.Client) -> None:
    pieces = post(http, "/tokenize", content="a€", with_pieces=True)["tokens"]
    joined = b"".join(
        one.encode() if isinstance(one := piece["piece"], str) else bytes(one) for piece in pieces
    )
    assert joined.decode() == "a€"


def test_a_chat_s_tokens_are_the_template_s(http: httpx2.Client) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chat = post(http, "/tokenize", messages=messages)
    text = post(http, "/tokenize", prompt="<user>Hello</user><assistant>")
    assert chat["tokens"] == text["tokens"]
    shorter = post(http, "/tokenize", messages=messages, add_generation_prompt=False)
    assert shorter["count"] < chat["count"]


def test_the_tokenizer_describes_itself(http: httpx2.Client) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"]
    assert {"bos_token", "pad_token"} <= info.keys()
    assert "message.role" in info["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "Give prompt, messages or content"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "exclude each other"),
        ("/tokenize", {"content": "a", "parse_special": False}, "parse_special may only be true"),
        ("/detokenize", {"tokens": [1 << 20]}, "this model's are 0 to"),
        ("/detokenize", {"tokens": "abc"}, "tokens: Expected"),
    ],
)
def test_what_is_no_text_is_refused(
    http: httpx2.Client, path: str, body: dict[str, Any], message: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"].replace("`", "")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/rerank", "/v1/audio/speech"])
def test_what_these_models_cannot_do_says_so(http: httpx2.Client, path: str) -> None:
    response = http.post(path, json={"input": "x"})
    assert response.status_code == 501
    error = response.json()["error"]
    assert error["code"] == "unsupported_endpoint"
    assert path in error["message"]

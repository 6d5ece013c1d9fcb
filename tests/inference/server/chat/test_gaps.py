from pathlib import Path

import msgspec
import pytest

from expertd_inference.server.api.completions import CompletionRequest, _prompts
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.chat.gaps import gap
from expertd_inference.server.hosting.model_text import ModelText

EXAMPLE = Path(__file__).parents[4] / "examples/tiny-mixtral"
QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


def text_with(*tokens: str) -> ModelText:
    """A model that knows these tokens."""
    text = ModelText("coder", EXAMPLE)
    text.tokenizer.add_tokens([*tokens], special_tokens=True)
    text.added_tokens |= {one: text.tokenizer.convert_tokens_to_ids(one) for one in tokens}
    return text


@pytest.mark.parametrize("markers", [QWEN, DEEPSEEK])
def test_a_gap_is_in_the_model_s_tokens(markers: tuple[str, str, str]) -> None:
    text = text_with(*markers)
    prompt = gap(text, "def f(", "return x", begun="x)")
    assert prompt == "{}def f({}return x{}x)".format(*markers)
    tokens = text.encode(prompt)
    assert [tokens.count(text.added_tokens[one]) for one in markers] == [1, 1, 1]


def test_other_files_come_before() -> None:
    files = [("a.py", "A"), ("b.py", "B")]
    with_names = gap(text_with(*QWEN, "<|file_sep|>"), "x", "y", files=files)
    assert with_names.startswith(
        "<|file_sep|>a.py\nA<|file_sep|>b.py\nB<|file_sep|><|fim_prefix|>x"
    )
    assert gap(text_with(*QWEN), "x", "y", files=files).startswith("A\n\nB\n\n<|fim_prefix|>x")
    assert gap(text_with(*QWEN, "<|file_sep|>"), "x", "y").startswith("<|fim_prefix|>x")


def test_a_model_without_such_tokens_fills_nothing() -> None:
    text = text_with("<|fim_prefix|>", "<|fim_middle|>")
    with pytest.raises(ApiError, match="the model coder has no tokens for filling gaps") as caught:
        gap(text, "x", "y", param="input_suffix")
    assert caught.value.param == "input_suffix"


def test_a_completion_with_a_suffix_fills_a_gap() -> None:
    text = text_with(*QWEN)
    body = msgspec.convert({"prompt": "def f(", "suffix": "return x"}, CompletionRequest)
    assert _prompts(body, text) == [text.encode(gap(text, "def f(", "return x"))]
    for fields in ({"prompt": [1]}, {"prompt": "x", "echo": True}):
        other = msgspec.convert({"suffix": "y", **fields}, CompletionRequest)
        with pytest.raises(ApiError, match="suffix needs a prompt of one text"):
            _prompts(other, text)

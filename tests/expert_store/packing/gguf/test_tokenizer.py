"""The tokenizer of a GGUF file: how it splits text, its special tokens, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from expertd.packing.gguf.model_file import GgufModel
from expertd.packing.gguf.tokenizer import special_tokens, write_tokenizer
from expertd_testing.tiny_models import byte_tokenizer
from expertstore.errors import CheckpointError

TEXT = "it's 1234 中文ab foo_bar\n\n x"


def model(**changes: Any) -> GgufModel:
    """The byte tokenizer, with ``changes`` of its metadata; None removes a value."""
    tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [token for token, _ in tokens],
        "token_type": [1] * 256 + [3],
        "merges": [],
        "eos_token_id": 256,
        **changes,
    }
    metadata = {
        f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None
    }
    metadata["general.architecture"] = "llama"
    return GgufModel(Path("m.gguf"), (Path("m.gguf"),), metadata, {})


@pytest.mark.parametrize(
    ("way", "pieces"),
    [
        # As llama.cpp splits it, too, but where its own expressions leave the published ones.
        ("gpt-2", ["it", "'s", " 1234", " 中文ab", " foo", "_", "bar", "\n\n", " x"]),
        (
            "refact",
            ["it", "'s", " ", "1", "2", "3", "4", " 中文ab", " foo", "_", "bar", "\n\n", " x"],
        ),
        ("glm4", ["it", "'s", " ", "123", "4", " 中文ab", " foo", "_bar", "\n\n", " x"]),
        ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", " 中文ab", " foo", "_bar", "\n\n", " x"]),
        ("hunyuan", ["it", "'s", " ", "1", "2", "3", "4", " 中文ab", " foo", "_bar", "\n\n", " x"]),
        (
            "bailingmoe",
            ["it", "'s", " ", "1", "2", "3", "4", " 中文ab", " foo", "_bar", "\n\n", " x"],
        ),
        (
            "deepseek-llm",
            ["it", "'", "s", " ", "1234", " ", "中文", "ab", " foo", "_", "bar", "\n", "\n", " x"],
        ),
        (
            "deepseek-v3",
            ["it", "'s", " ", "123", "4", " ", "中文", "ab", " foo", "_bar", "\n\n", " x"],
        ),
        ("kimi-k2", ["it's", " ", "123", "4", " ", "中文", "ab", " foo", "_bar", "\n\n", " x"]),
    ],
)
def test_how_text_is_split(way: str, pieces: list[str], tmp_path: Path) -> None:
    write_tokenizer(model(pre=way), tmp_path)
    tokenizer: Any = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert [TEXT[begin:end] for begin, end in spans] == pieces


def test_special_tokens(tmp_path: Path) -> None:
    """A token that ends a turn ends a text as well."""
    found = special_tokens(model(eot_token_id=7, eom_token_id=256, bos_token_id=3))
    assert found == {"eos_token_id": [256, 7], "bos_token_id": 3, "pad_token_id": None}
    write_tokenizer(model(bos_token_id=3), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert (config["eos_token"], config["bos_token"]) == ("<|end|>", "$")
    assert "chat_template" not in config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "has no tokenizer"),
        ({"tokens": [3, 4]}, "has no tokenizer"),
        ({"token_type": [1, 1]}, "has 257 tokens and other numbers of token_type"),
        ({"pre": "made-up"}, r"way that is not known \(made-up; known are .*glm4"),
        ({"pre": None}, "way that is not known .unnamed; known"),
        ({"model": "bert"}, "tokenizer of which transformers can make none .Cannot build"),
        ({"merges": ["a"]}, "of which transformers can make none"),
        ({"eos_token_id": "x"}, "has tokenizer.ggml.eos_token_id of another kind"),
    ],
)
def test_tokenizers_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    bent = replace(model(), metadata=model(**changes).metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        write_tokenizer(bent, tmp_path)
    assert "\n" not in str(caught.value)

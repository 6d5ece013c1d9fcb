"""A pack's config.json: what cannot be is refused in a sentence, what can be done here is done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MixtralConfig

from expertd_inference.model.loading import load_trunk
from expertd_inference.model.pack_config import context_tokens
from expertstore.errors import PackError
from expertstore.pack.manifest import read_manifest

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def edited(packed: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A pack of Mixtral with other values in its config.json; those that are None are null."""
    pack = shutil.copytree(packed("mixtral"), tmp_path_factory.mktemp("edited") / "pack")
    whole = json.loads((pack / "config.json").read_text())

    def edit(**fields: Any) -> Path:
        (pack / "config.json").write_text(json.dumps(whole | fields))
        return pack

    return edit


def load(pack: Path, say: Callable[[str], None] = pytest.fail) -> Any:
    return load_trunk(pack, read_manifest(pack).manifest, say=say).model


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 0},
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": "2"},
        {"num_local_experts": 4},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x", "rope_theta": 1e4}},
        {"rope_parameters": 5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
        {"max_position_embeddings": None},
        {"max_position_embeddings": "512"},
        {"pad_token_id": 999},
        {"sliding_window": 0},
        {"sliding_window": -1},
        {"layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["nope"] * 3},
        {"is_encoder_decoder": True},
        {"dtype": "float99"},
        {"dtype": []},
        {"hidden_act": "nope"},
        {"hidden_size": 64},
        {"hidden_size": 0},
        {"hidden_size": 1_000_000},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 1_000_000_000},
        {"vocab_size": 10_000_000},
        {"head_dim": -1},
        {"id2label": "x"},
        {"attn_implementation": 5},
        {"attn_implementation": []},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": -1e-5},
        {"output_hidden_states": 0.5},
        {"tie_word_embeddings": "x"},
    ],
    ids=str,
)
def test_values_that_cannot_be(fields: dict[str, Any], edited: Callable[..., Path]) -> None:
    with pytest.raises(PackError, match=r"config\.json|experts of|trunk") as caught:
        load(edited(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_group": None},
        {"n_group": 0},
        {"n_group": 3},
        {"topk_group": None},
        {"topk_group": 3},
        {"topk_group": -1},
        {"num_experts_per_tok": None},
    ],
    ids=str,
)
def test_groups_of_experts_that_cannot_be(
    fields: dict[str, Any], packed: Make, tmp_path: Path
) -> None:
    pack = shutil.copytree(packed("deepseek_v3"), tmp_path / "pack")
    whole = json.loads((pack / "config.json").read_text())
    (pack / "config.json").write_text(json.dumps(whole | fields))
    with pytest.raises(PackError, match=r"config\.json cannot be used"):
        load(pack)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", b"\xff\xfe"])
def test_files_that_are_no_configuration(text: str | bytes, edited: Callable[..., Path]) -> None:
    pack = edited()
    (pack / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PackError, match=r"config\.json"):
        load(pack)


@pytest.mark.parametrize(
    "asked", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn", "nope"]
)
def test_attention_that_is_not_to_be_had(asked: str, edited: Callable[..., Path]) -> None:
    said: list[str] = []
    model = load(edited(attn_implementation=asked), said.append)
    assert model.config._attn_implementation == "sdpa"
    assert len(said) == 1
    assert f"asks for attention by {asked}, which is for GPUs" in said[0]


@pytest.mark.parametrize("asked", ["eager", "sdpa", None])
def test_attention_that_is(asked: str | None, edited: Callable[..., Path]) -> None:
    model = load(edited(attn_implementation=asked))
    assert model.config._attn_implementation == (asked or "sdpa")


def test_values_that_can_be(edited: Callable[..., Path]) -> None:
    # Results by position instead of by name; another number of experts; Python's JSON.
    model = load(edited(return_dict=False, num_experts_per_tok=3, initializer_range=float("nan")))
    assert model.config.return_dict
    assert model.model.layers[0].mlp.gate.top_k == 3


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        (None, 4096),
        ({"rope_type": "default"}, 4096),
        ({"factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"factor": 4, "original_max_position_embeddings": 1024}, 4096),
        ({"factor": 4.0}, 4096),
        ({"full_attention": {"factor": 2.5, "original_max_position_embeddings": 4000}}, 10000),
    ],
)
def test_context(rope: Any, tokens: int) -> None:
    text = SimpleNamespace(max_position_embeddings=4096, rope_parameters=rope)
    assert context_tokens(SimpleNamespace(get_text_config=lambda: text)) == tokens


def test_context_of_yarn() -> None:
    config = MixtralConfig(
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    assert context_tokens(config) == 2048
    assert context_tokens(SimpleNamespace(get_text_config=lambda: SimpleNamespace())) is None

"""What a model needs is what the packer would write, and what a pack holds."""

import json
from pathlib import Path

import pytest

from expertd.packing.shapes import SHAPES
from expertd.packing.synthetic import make_pack
from expertd_inference.advice.models import Model, find_model
from expertstore.errors import InvalidInputError, PackError

TINY = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip
BILLIONS = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "qwen3-next-80b-a3b": 79.7,
    "olmoe-1b-7b": 6.92,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0,
    "glm-4.5-air": 106.9,
    "phi-3.5-moe": 41.9,
    "granite-3.0-1b-a400m": 1.33,
    "granite-3.0-3b-a800m": 3.30,
}
"""Parameters, as published."""


def weights(model: Model) -> float:
    """Of the experts, and of the matrices that a token passes."""
    need = model.needs[0]
    experts = sum(
        group.count
        * group.num_experts
        * sum(matrix.out_features * matrix.in_features for matrix in group.layout.matrices)
        for group in need.experts
    )
    trunk = sum(count * m.out_features * m.in_features for m, count in need.linears)
    return experts + trunk


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_models(name: str) -> None:
    model = find_model(name)
    config = model.config
    embeddings = config["vocab_size"] * config["hidden_size"]
    found = weights(model) + (0 if config["tie_word_embeddings"] else embeddings)
    assert found / 1e9 == pytest.approx(BILLIONS[name], rel=0.004), "all but norms and biases"
    schemes = {need.scheme for need in model.needs}
    if name.startswith("gpt-oss"):  # and what has fewer bits than it comes in
        assert schemes == {"as-is", "paper-3bit", "paper-2bit"}
    else:
        assert {"bf16", "4bit"} <= schemes
        assert "as-is" not in schemes


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        ("qwen3-30b-a3b", "4bit-fast"),  # a quantized head
        ("mixtral-8x7b", "paper-2bit"),  # scales that are quantized again
        ("granite-3.0-1b-a400m", "bf16"),  # embeddings that are the head
    ],
)
def test_a_pack_needs_what_its_configuration_said(shape: str, scheme: str, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", shape, scheme, 2, overrides=TINY)
    (of_pack,) = find_model(str(pack)).needs
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_bytes((pack / "config.json").read_bytes())
    planned = {need.scheme: need for need in find_model(str(checkpoint)).needs}[scheme]
    assert sorted(map(str, of_pack.linears)) == sorted(map(str, planned.linears))
    assert of_pack.experts == planned.experts
    assert of_pack.trunk_bytes == planned.trunk_bytes == (pack / "trunk.safetensors").stat().st_size
    assert of_pack.token_bytes == planned.token_bytes


def test_a_configuration_s_file_will_do(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    shape = {**SHAPES["olmoe-1b-7b"], "dtype": "bfloat16", "hidden_act": "silu"}
    file.write_text(json.dumps(shape))
    model = find_model(str(file))
    assert model.name == "mine"
    assert {need.num_layers for need in model.needs} == {16}


def test_the_least_budget_is_what_the_daemon_says(tmp_path: Path) -> None:
    from expertstore.pack.manifest import read_manifest

    pack = make_pack(tmp_path / "pack", "olmoe-1b-7b", "4bit", 2, overrides=TINY)
    (need,) = find_model(str(pack)).needs
    manifest = read_manifest(pack).manifest
    assert need.working_set_bytes == manifest.working_set_bytes
    assert need.expert_bytes == manifest.expert_bytes


@pytest.mark.parametrize("name", ["mixtral-8x7", "mistralai/Mixtral-8x7B-Instruct-v0.1"])
def test_an_unknown_shape_names_the_nearest(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"nearest are mixtral-8x7b"):
        find_model(name)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"neither a pack nor a checkpoint"):
        find_model(str(tmp_path))


def test_a_pack_of_another_time(tmp_path: Path) -> None:
    (tmp_path / "pack.json").write_text('{"format": "expertd-pack", "format_version": 99}')
    with pytest.raises(PackError, match=r"version 99, and this expertd reads 1"):
        find_model(str(tmp_path))


def test_a_pack_whose_trunk_is_gone(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", "olmoe-1b-7b", "4bit", 1, overrides=TINY)
    (pack / "trunk.safetensors").unlink()
    with pytest.raises(PackError, match=r"trunk\.safetensors cannot be read"):
        find_model(str(pack))

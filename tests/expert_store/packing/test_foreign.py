"""Checkpoints in other formats are named, wherever they say what they are, and never packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.foreign import find_format
from expertstore.errors import CheckpointError
from tests.expert_store.packing.conftest import MakeCheckpoint
from tests.expert_store.packing.editing import edited, write_config

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3"
WEIGHT = f"{EXPERT}.weight"


def scaled(tensors: dict[str, Tensor]) -> None:
    """Bytes with a scale per row, in a way that nobody has."""
    tensors[WEIGHT] = torch.ones(256, 128, dtype=torch.uint8)
    tensors[f"{WEIGHT}_scale"] = torch.ones(256, 1)


def packed(*ends: str) -> Any:
    """In place of the weight, tensors with these ends of names."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[WEIGHT]
        for end in ends:
            tensors[f"{EXPERT}{end}"] = torch.ones(16, 128, dtype=torch.int32)

    return change


@pytest.mark.parametrize(
    ("change", "files", "config", "what"),
    [
        (scaled, {}, {}, f"{WEIGHT} in U8 with {WEIGHT}_scale beside it"),
        (
            scaled, {}, {"compression_config": {"quant_method": "compressed-tensors"}},
            "compressed-tensors, by compression_config in config.json",
        ),
        (
            scaled, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, {},
            "NVFP4 of ModelOpt, by hf_quant_config.json",
        ),
        (
            scaled, {"quant_model_description_w8a8.json": {"model_quant_type": "W8A8"}}, {},
            "W8A8 of msModelSlim, by quant_model_description_w8a8.json",
        ),
        (scaled, {}, {"quantization": {"group_size": 64, "bits": 4}}, "4 bits of MLX"),
        (packed(".W_q"), {"quantize_config.json": {"bits": 4}}, {}, "4 bits of GPTQ, by quantize"),
        (packed(".weight.absmax"), {}, {}, "bitsandbytes, by the tensor"),
        (
            packed(".weight"), {}, {"quantization_config": {"quant_method": "gptq"}},
            "gptq, by quantization_config in config.json",
        ),
    ],
)  # fmt: skip
def test_it_is_named(
    change: Any,
    files: dict[str, Any],
    config: dict[str, Any],
    what: str,
    tmp_path: Path,
    checkpoint_of: MakeCheckpoint,
) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, change)
    write_config(path, **config)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert f"is already quantized ({what}" in str(caught.value)
    assert str(caught.value).endswith("pack the 16-bit checkpoint of the model.")


def test_weights_that_are_whole_are_packed(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    """Beside what a tool has left; transformers looks at none of it."""
    path = edited(checkpoint_of("mixtral"), tmp_path, lambda _: None)
    (path / "quantize_config.json").write_text("{")
    with Checkpoint(path) as checkpoint:
        assert not checkpoint.disagrees
    write_config(path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with Checkpoint(path) as checkpoint:
        assert checkpoint.disagrees == "bitsandbytes"


def test_a_side_file_does_not_explain_what_is_missing(
    tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, lambda t: t.pop("model.norm.weight"))
    (path / "quantize_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"lacks the weights of model\.norm\.weight"):
        Checkpoint(path)


def test_formats_of_parts_of_a_model(tmp_path: Path) -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    assert find_format(tmp_path, config, ()).startswith("awq, by")
    assert not find_format(tmp_path, {"text_config": {}}, ["model.norm.weight"])

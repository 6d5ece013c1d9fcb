"""GPT-OSS with random experts in MXFP4: any bytes are one."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertd_testing.tiny_models import make_checkpoint
from expertstore.pack.codec import E2M1, E8M0_BIAS
from expertstore.pack.layout import MXFP4_GROUP_SIZE

_RMS = math.sqrt(sum(value * value for value in E2M1) / len(E2M1))


def make_mxfp4_checkpoint(path: Path, **overrides: Any) -> Path:
    """A tiny GPT-OSS as its makers publish it: experts in MXFP4, the rest in bfloat16."""
    make_checkpoint("gpt_oss", path, **overrides)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = tensors.pop(name).shape
        nibbles, scales = _random(num_experts * rows, columns, generator)
        groups = (num_experts, rows, columns // MXFP4_GROUP_SIZE)
        blocks = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        tensors[f"{name}_blocks"] = blocks.view(*groups, MXFP4_GROUP_SIZE // 2)
        tensors[f"{name}_scales"] = scales.view(groups)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _random(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nibbles [rows, columns] and scales [rows, columns / 32]."""
    nibbles = torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8)
    exponent = round(math.log2(columns**-0.5 / _RMS))
    low = E8M0_BIAS + exponent - 1
    scales = torch.randint(
        low, low + 3, (rows, columns // MXFP4_GROUP_SIZE), generator=generator, dtype=torch.uint8
    )
    return nibbles, scales

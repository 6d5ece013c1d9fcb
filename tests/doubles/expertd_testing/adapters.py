"""Random adapters in peft's format, without peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def make_adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 2,
    seed: int = 0,
    std: float = 0.3,
    **config: Any,
) -> Path:
    """One that adds to each module of ``shapes``, [out, in], by its name; ``config`` is added."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = std * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = values
    save_file(tensors, path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "b"}
    (path / "adapter_config.json").write_text(json.dumps(told | config))
    return path

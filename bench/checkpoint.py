"""Checkpoints of real models' shapes for stock transformers: bf16, of random weights.

As :mod:`bench.synthetic` does for packs: the weights are drawn once and repeated, with deviations
that keep activations sane and routing even.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.synthetic import BRANCH_GAIN, config_of
from expertd.packing.architecture import read_architecture
from expertstore.pack.tensor_file import build_header

_POOL = (1 << 24) - 3
_BF16_BYTES = 2


def make_checkpoint(
    directory: Path, shape: str, layers: int, *, overrides: Mapping[str, Any] | None = None
) -> Path:
    """Writes ``shape`` of :data:`bench.synthetic.SHAPES`, cut to ``layers``; returns the directory.

    Only for shapes whose experts are named as in OLMoE's and Qwen3's checkpoints: ValueError for
    others.
    """
    directory.mkdir(parents=True)
    config = _config(shape, layers, overrides)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    tensors = list(_tensors(directory, config))
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    drawn: dict[float, Tensor] = {}
    with (directory / "model.safetensors").open("wb") as out:
        out.write(build_header([(name, "BF16", size) for name, size, _ in tensors]))
        for number, (_, size, deviation) in enumerate(tensors):
            count = math.prod(size)
            if deviation is None:
                values = torch.ones(count, dtype=torch.bfloat16)
            else:
                if deviation not in drawn:
                    drawn[deviation] = (pool * deviation).to(torch.bfloat16)
                # From another place each time, so that experts differ.
                start = number * 977 % _POOL
                times = -(-(start + count) // _POOL)
                values = drawn[deviation].repeat(times)[start : start + count]
            out.write(values.view(torch.uint8).numpy().data)
    return directory


def checkpoint_bytes(shape: str, layers: int) -> int:
    """What the weights take, about: what is not in experts, attention or embeddings is small."""
    config = _config(shape, layers, None)
    hidden, inner = config["hidden_size"], _inner(config)
    heads = config.get("head_dim", hidden // config["num_attention_heads"])
    attention = 2 * heads * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = hidden * (attention + 3 * inner * config["num_experts"])
    return _BF16_BYTES * (layers * layer + 2 * config["vocab_size"] * hidden)


def _config(shape: str, layers: int, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    config = config_of(shape, layers, overrides)
    if "num_experts" not in config:
        raise ValueError(f"{shape} has other names for its experts")
    return config


def _inner(config: Mapping[str, Any]) -> int:
    # As the architecture does: OLMoE has only the one.
    olmoe = config["model_type"] == "olmoe"
    inner: int = config["intermediate_size" if olmoe else "moe_intermediate_size"]
    return inner


def _tensors(
    directory: Path, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, shape, and deviation: None for norms, which are one."""
    architecture = read_architecture(directory)
    experts = {name for module in architecture.experts for name in module.parameters()}
    for name, parameter in architecture.model.named_parameters():
        size = tuple(parameter.shape)
        if name in experts:
            continue
        if len(size) == 1:
            yield name, size, None
        elif "embed" in name:
            yield name, size, 1.0
        else:
            gain = BRANCH_GAIN if ".o_proj." in name else 1.0
            yield name, size, gain / math.sqrt(size[-1])
    hidden, inner = config["hidden_size"], _inner(config)
    for layer in range(config["num_hidden_layers"]):
        for expert in range(config["num_experts"]):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            yield f"{name}.gate_proj.weight", (inner, hidden), hidden**-0.5
            yield f"{name}.up_proj.weight", (inner, hidden), hidden**-0.5
            yield f"{name}.down_proj.weight", (hidden, inner), BRANCH_GAIN * inner**-0.5

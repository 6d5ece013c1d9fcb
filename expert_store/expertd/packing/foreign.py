"""Checkpoints that are quantized already, in formats that are not read: recognised and named.

``config.json`` need not say it. Some tools describe their work in files beside it or under other
keys, and some only leave integers where a model has weights. What decides is the tensors: a side
file alone, which a tool has left beside weights that are whole, refuses nothing.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from expertd.packing.checkpoint_files import CheckpointTensor, read_json
from expertstore.errors import CheckpointError

FLOATS = {"BF16", "F16", "F32", "F64"}
"""Types of weights, in safetensors' names, that mean what they say."""

_SIDE_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quant_model_description*.json": "msModelSlim",
    "quantization_config.json": "",
    "quanto_qmap.json": "Quanto",
    "quantization_map.json": "Quanto",
    "recipe.yaml": "compressed-tensors",
    "smash_config.json": "Pruna",
    "qmodel.pt": "HQQ",
}
"""Files that tools write beside what they have quantized, by patterns of their names."""

_KEYS = {"quantization_config": "", "compression_config": "compressed-tensors",
         "quantization": "MLX", "quant_config": ""}  # fmt: skip
"""Keys of ``config.json`` that describe it."""

_TENSORS = (
    (r"\.g_idx$", "GPTQ"),
    (r"\.qweight$", "GPTQ or AWQ"),
    (r"\.weight_packed$", "compressed-tensors"),
    (r"\.(absmax|quant_map|SCB)$|\.quant_state\.", "bitsandbytes"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\.biases$", "MLX"),
    (r"\.(qdata|W_q)$", "HQQ or torchao"),
    (r"\.(codebooks?|codes|indices|centroids)$", "a codebook"),
    (r"_blocks$", "MXFP4"),
)
"""Ends of tensors' names that give a format away."""

READ = "MXFP4, NVFP4, FP8, MXFP8, GPTQ, AWQ and compressed-tensors"
"""What is read, in the words of users."""


def quantized_error(path: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that is quantized as ``what``."""
    return CheckpointError(
        f"{path} is already quantized ({what}), in a way that is not read ({READ} are); pack "
        "the 16-bit checkpoint of the model."
    )


def type_error(
    path: Path, config: Mapping[str, Any], names: Iterable[str], tensor: CheckpointTensor
) -> CheckpointError:
    """The error for ``tensor``, one of those of ``names``, whose type is not one of weights."""
    names = list(names)
    dtype = tensor.entry.dtype
    if what := find_format(path, config, names):
        return quantized_error(path, what)
    stem = tensor.name.removesuffix(".weight")
    beside = [name for name in names if name.startswith(stem) and "scale" in name[len(stem) :]]
    if beside:
        return quantized_error(path, f"{tensor.name} in {dtype} with {min(beside)} beside it")
    return CheckpointError(
        f"{tensor.name} in {tensor.file} has the type {dtype}, which cannot be packed; pack a "
        "checkpoint in 16 or 32 bits."
    )


def is_evident(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether ``config`` or the tensors' names tell a format, and not only a file beside them."""
    return any(isinstance(config.get(key), dict) for key in _KEYS) or any(
        re.search(pattern, name) for name in names for pattern, _ in _TENSORS
    )


def find_format(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> str:
    """The format that ``config``, a side file or the tensors' ``names`` tell; or empty."""
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    for place in places:
        for key, maker in _KEYS.items():
            if (description := place.get(key)) and isinstance(description, dict):
                return _describe(description, maker, f"{key} in config.json")
    for pattern, maker in _SIDE_FILES.items():
        for file in sorted(path.glob(pattern)):
            description = {}
            if file.suffix == ".json":
                try:
                    description = read_json(file)
                except (CheckpointError, FileNotFoundError):
                    description = {}
            return _describe(description, maker, file.name)
    names = list(names)
    for pattern, maker in _TENSORS:
        for name in names:
            if re.search(pattern, name):
                return f"{maker}, by the tensor {name}"
    return ""


def _describe(description: Any, maker: str, where: str) -> str:  # noqa: ANN401 - what JSON holds
    """``NVFP4 of ModelOpt, by hf_quant_config.json``, as far as it says so."""
    method = ""
    if isinstance(description, dict):
        inner = description.get("quantization")
        for source in (inner, description):
            if isinstance(source, dict):
                algorithm = source.get("quant_algo") or source.get("quant_method")
                bits = source.get("bits") or source.get("w_bit")
                method = method or str(algorithm or (f"{bits} bits" if bits else ""))
        method = method or str(description.get("model_quant_type") or "")
    named = maker and method and maker.lower() not in method.lower()
    what = f"{method} of {maker}" if named else method or maker or "an unnamed format"
    return f"{what}, by {where}"

"""An adapter as peft writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA (Hu et al., arXiv 2106.09685), also with ranks and scales that differ by module and with
rank-stabilized scales (Kalajdzievski, arXiv 2312.03732): to what a module gives of x it adds
``scale * B(A(x))``. What changes the base's own weights, or adds in another way, is refused by its
name. Everything is plain data here, and no weight is read.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expertstore.errors import AdapterError
from expertstore.pack.tensor_file import TensorEntry, read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILES = (CONFIG_NAME, WEIGHTS_NAME)
PREFIX = "base_model.model."
_UNKNOWN = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "biases of its own (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "embeddings of tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "arrow_config": "Arrow's routing",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's layers",
}
"""Fields of which any value means what is not done here, and how it is called."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` that leave other base weights behind."""


@dataclass(frozen=True)
class LowRank:
    """What is added to the module ``module``; ``a`` is [r, in] and ``b`` [out, r].

    Of all experts of a layer together ``a`` is [r * experts, in], and ``b`` [out, r * experts].
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    scale: float


@dataclass(frozen=True)
class AdapterFiles:
    """What is in an adapter's directory; ``base`` is what it was trained on, as it says."""

    directory: Path
    base: str
    parts: tuple[LowRank, ...]

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return self.directory / WEIGHTS_NAME


def read_adapter(directory: Path) -> AdapterFiles:
    """Raises :class:`AdapterError`."""
    config = _read_config(directory / CONFIG_NAME)
    try:
        tensors = read_header(directory / WEIGHTS_NAME)
    except OSError as error:
        raise AdapterError(
            f"{directory} is no adapter that can be used: {WEIGHTS_NAME} cannot be read "
            f"({error.strerror})."
        ) from error
    except ValueError as error:
        raise AdapterError(f"{directory / WEIGHTS_NAME} cannot be used: {error}.") from error
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        place = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if place is None:
            raise AdapterError(
                f"{directory} has the tensor {name}, and adapters are known that add A and B to "
                "linear layers and experts; train one without it."
            )
        found.setdefault(place[1], {})[place[2]] = entry
    if not found:
        raise AdapterError(f"{directory} has no weights; save the adapter again.")
    parts = tuple(_part(directory, config, module, pair) for module, pair in found.items())
    return AdapterFiles(directory, str(config.get("base_model_name_or_path") or ""), parts)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise AdapterError(
            f"{path.parent} is no adapter in peft's format: {path.name} cannot be read "
            f"({error.strerror})."
        ) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be used: {error}; save the adapter again.") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path.parent} is of peft's type {kind}, and only LORA is known here.")
    for field, name in _UNKNOWN.items():
        if config.get(field):
            raise AdapterError(f"{path.parent} has {name}, which is not known here; train without.")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path.parent} has biases (bias {config['bias']!r}), which is not known here; train "
            "with bias 'none'."
        )
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{path.parent} began with {begun}, which changes the base's weights; save it "
            "converted to plain LoRA (path_initial_model_for_weight_conversion)."
        )
    return config


def _part(
    directory: Path, config: dict[str, Any], module: str, pair: dict[str, TensorEntry]
) -> LowRank:
    for letter in "AB":
        if letter not in pair:
            raise AdapterError(f"{directory} lacks lora_{letter} of {module}; save it again.")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{directory} has lora_A of {module} in the shape {list(a.shape)} and lora_B in "
            f"{list(b.shape)}, which do not fit; save it again."
        )
    if not {a.dtype, b.dtype} <= {"F32", "F16", "BF16"}:
        raise AdapterError(
            f"{directory} has {module} in the type {a.dtype}; save it in 16 or 32 bits."
        )
    rank = _by_pattern(directory, config, "rank_pattern", "r", module)
    alpha = _by_pattern(directory, config, "alpha_pattern", "lora_alpha", module)
    if not rank or rank < 0 or a.shape[0] % rank:
        raise AdapterError(
            f"{directory} has {module} of rank {a.shape[0]}, and its {CONFIG_NAME} says {rank:g}; "
            "give the one that belongs to these weights."
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(module, a, b, scale)


def _by_pattern(
    directory: Path, config: dict[str, Any], patterns: str, default: str, module: str
) -> float:
    """A number of a module, as peft finds it: the first pattern that ends the module's name."""
    known = config.get(patterns) or {}
    value = config.get(default, 8)
    # Wrapped twice, a module of parameters has the names of both.
    name = module.replace(".base_layer", "")
    for pattern, own in known.items() if isinstance(known, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                value = own
                break
        except re.error:
            continue
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterError(f"{directory / CONFIG_NAME} has {default} {value!r}; give a number.")
    return float(value)

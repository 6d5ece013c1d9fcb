"""What a checkpoint's configuration says of how its weights are quantized: plain data."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from expertd.packing.checkpoint_files import read_json
from expertd.packing.stored.weight import Packing
from expertstore.errors import CheckpointError

_KEYS = ("quantization_config", "compression_config")

METHODS: Mapping[str, frozenset[Packing]] = {
    "awq": frozenset({Packing.AWQ}),
    "compressed-tensors": frozenset(
        {Packing.INTEGERS, Packing.MXFP4, Packing.NVFP4_DIVISOR, Packing.FP8, Packing.MXFP8}
    ),
    "fbgemm_fp8": frozenset({Packing.FP8}),
    "fp8": frozenset({Packing.FP8, Packing.MXFP8, Packing.MXFP4}),
    "gptq": frozenset({Packing.GPTQ, Packing.GPTQ_V2}),
    "modelopt": frozenset({Packing.NVFP4, Packing.FP8, Packing.MXFP4, Packing.MXFP8}),
    "mxfp4": frozenset({Packing.MXFP4_BLOCKS, Packing.MXFP4}),
    "mxfp8": frozenset({Packing.MXFP8, Packing.FP8}),
}
"""Values of ``quant_method`` that are known, and how their tensors are packed."""

_SIDE_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""What tools write beside ``config.json``, and the method of one that names none."""


@dataclass(frozen=True)
class Description:
    """The object ``quantization_config``, empty where there is none."""

    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Its ``quant_method``, in lower case."""
        return str(self.fields.get("quant_method") or "").lower()

    def block(self, module: str) -> tuple[int, int] | None:
        """FP8: rows and columns of a block of ``module``, if they are given."""
        found = read_block(self.fields.get("weight_block_size"))
        return found or read_block((self.weights(module) or {}).get("block_structure"))

    def algorithm(self, module: str) -> str:
        """ModelOpt: its name for the form of the weights of ``module``, such as NVFP4."""
        layers = self.fields.get("quantized_layers")
        of_module = layers.get(module) if isinstance(layers, dict) else None
        place = of_module if isinstance(of_module, dict) else self.fields
        return str(place.get("quant_algo") or "").upper()

    @property
    def bits(self) -> int | None:
        """GPTQ and AWQ: of the integers."""
        found = self.fields.get("bits", self.fields.get("w_bit"))
        return found if isinstance(found, int) and 0 < found <= 8 else None

    @property
    def is_in_activation_order(self) -> bool:
        """GPTQ: whether inputs are grouped by their activations (``desc_act``)."""
        return bool(self.fields.get("desc_act"))

    @property
    def is_gptq_v2(self) -> bool:
        """GPTQ: whether zeros are written as they are."""
        return self.fields.get("checkpoint_format") == "gptq_v2"

    @property
    def has_fp4_experts(self) -> bool:
        """DeepSeek V4: whether experts have 4 bits where the rest has FP8."""
        return bool(self.fields.get("expert_dtype") == "fp4")

    def num_bits(self, module: str) -> int | None:
        """compressed-tensors: the bits of the weights of ``module``, by its groups of targets."""
        bits = (self.weights(module) or {}).get("num_bits")
        return bits if isinstance(bits, int) and 0 < bits <= 8 else None

    def weights(self, module: str) -> dict[str, Any] | None:
        """compressed-tensors: how the weights of ``module`` are quantized."""
        groups = self.fields.get("config_groups")
        known = (
            [group for group in groups.values() if isinstance(group, dict)]
            if isinstance(groups, dict)
            else []
        )
        fitting = [group for group in known if _fits(group.get("targets"), module)]
        for group in fitting or known:
            if isinstance(found := group.get("weights"), dict):
                return found
        return None

    def is_ignored(self, module: str) -> bool:
        """Whether ``module`` is named among those that are not quantized."""
        return any(_fits(self.fields.get(key), module, is_class=False) for key in _IGNORED)


def read_block(size: object) -> tuple[int, int] | None:
    """Rows and columns, if ``size`` is a list of two such numbers."""
    if isinstance(size, list) and len(size) == 2:
        rows, columns = size
        if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
            return rows, columns
    return None


_IGNORED = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")


def _fits(names: object, module: str, *, is_class: bool = True) -> bool:
    """Whether one of ``names`` is ``module``'s: a class, a name, a pattern or an expression."""
    listed = [str(name) for name in names] if isinstance(names, list) else []
    if is_class and "Linear" in listed:
        return True
    for name in listed:
        if name.startswith("re:"):
            with suppress(re.error):
                if re.match(name.removeprefix("re:"), module):
                    return True
        elif fnmatchcase(module, name) or f".{name}." in f".{module}.":
            return True
    return False


def read_description(path: Path, config: Mapping[str, Any]) -> Description:
    """What ``config`` of the checkpoint says, of the model or of a part such as ``text_config``.

    Where it says nothing, a tool's own file beside it may.
    """
    for place in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if isinstance(found := place.get(key), dict) and found:
                # DeepSeek V4 has this beside it.
                return Description({"expert_dtype": place.get("expert_dtype"), **found})
    for name, method in _SIDE_FILES.items():
        try:
            found = read_json(path / name)
        except (CheckpointError, FileNotFoundError):
            continue
        if isinstance(found, dict):
            inner = found.get("quantization")
            return Description(
                {"quant_method": method, **(inner if isinstance(inner, dict) else found)}
            )
    return Description({})

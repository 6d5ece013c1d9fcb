"""What a checkpoint's configuration says of how its weights are quantized: plain data."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.packing.checkpoint_files import read_json
from expertd.packing.stored.weight import Packing
from expertstore.errors import CheckpointError

_KEYS = ("quantization_config", "compression_config")

METHODS: Mapping[str, frozenset[Packing]] = {
    "awq": frozenset({Packing.AWQ}),
    "compressed-tensors": frozenset({Packing.INTEGERS, Packing.MXFP4, Packing.FP8}),
    "fbgemm_fp8": frozenset({Packing.FP8}),
    "fp8": frozenset({Packing.FP8, Packing.MXFP4}),
    "gptq": frozenset({Packing.GPTQ, Packing.GPTQ_V2}),
    "modelopt": frozenset({Packing.FP8}),
    "mxfp4": frozenset({Packing.MXFP4_BLOCKS, Packing.MXFP4}),
    "mxfp8": frozenset({Packing.FP8}),
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

    @property
    def block(self) -> tuple[int, int] | None:
        """FP8: rows and columns of a block, if they are given."""
        size = self.fields.get("weight_block_size")
        if isinstance(size, list) and len(size) == 2:
            rows, columns = size
            if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
                return rows, columns
        return None

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

    def num_bits(self, module: str) -> int | None:
        """compressed-tensors: the bits of the weights of ``module``, by its groups of targets."""
        widths = [
            (bits, self._targets(group.get("targets"), module)) for group, bits in self._groups()
        ]
        return next((bits for bits, fits in widths if fits), widths[0][0] if widths else None)

    def _groups(self) -> Iterator[tuple[Mapping[str, Any], int]]:
        groups = self.fields.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            bits = weights.get("num_bits") if isinstance(weights, dict) else None
            if isinstance(bits, int) and 0 < bits <= 8:
                yield group, bits

    @staticmethod
    def _targets(targets: object, module: str) -> bool:
        """Whether one of ``targets`` is ``module``: a class, a name or an expression for names."""
        for target in targets if isinstance(targets, list) else ():
            text = str(target)
            if text.startswith("re:"):
                try:
                    if re.match(text.removeprefix("re:"), module):
                        return True
                except re.error:
                    continue
            elif text in {"Linear", module}:
                return True
        return False


def read_description(path: Path, config: Mapping[str, Any]) -> Description:
    """What ``config`` of the checkpoint says, of the model or of a part such as ``text_config``.

    Where it says nothing, a tool's own file beside it may.
    """
    for place in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if isinstance(found := place.get(key), dict) and found:
                return Description(found)
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

"""What a checkpoint's configuration says of how its weights are quantized: plain data."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_KEYS = ("quantization_config", "compression_config")

METHODS = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
}
"""Values of ``quant_method`` whose tensors are read, and what users call them."""


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
            if isinstance(bits, int):
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


def read_description(config: Mapping[str, Any]) -> Description:
    """What ``config.json`` says, of the whole model or of a part such as ``text_config``."""
    for place in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _KEYS:
            if isinstance(found := place.get(key), dict) and found:
                return Description(found)
    return Description({})

"""MXFP4 experts of a checkpoint, as GPT-OSS comes: rearranged, or made weights again.

The checkpoint has two tensors per fused parameter: ``NAME_blocks`` [E, out, in / 32, 16] with
two nibbles per byte, the first of them in the low half, and ``NAME_scales`` [E, out, in / 32].
Unlike the parameter in the model they are [out, in]. A record has the same nibbles in the order
of 4 bits (:mod:`expertstore.pack.codec`), gate rows first, and the same scales: nothing is lost.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from expertstore.pack.codec import E8M0_NAN, dequantize, encode
from expertstore.pack.layout import MXFP4_BITS, MXFP4_GROUP_SIZE, Encoding, Matrix

METHOD = "mxfp4"
"""``quant_method`` of such a checkpoint's configuration."""
BITS_PER_WEIGHT = MXFP4_BITS + 8 / MXFP4_GROUP_SIZE


@dataclass(frozen=True)
class Mxfp4Weight:
    """One matrix [out, in]: ``nibbles`` [out, in] below 16, ``scales`` [out, in / 32], both U8."""

    nibbles: Tensor
    scales: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether all scales are numbers; the nibbles always are."""
        return not bool((self.scales == E8M0_NAN).any())

    @classmethod
    def from_blocks(cls, blocks: Tensor, scales: Tensor) -> Self:
        """Of one expert's ``blocks`` [out, in / 32, 16] and ``scales``."""
        nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1)
        return cls(nibbles.view(blocks.shape[0], -1), scales)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a matrix ``name`` of a record."""
        return {f"{name}.q": encode(self.nibbles, MXFP4_BITS), f"{name}.scale": self.scales}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] in ``dtype``; NaN where a scale is none."""
        matrix = Matrix(
            name="weight",
            encoding=Encoding.MXFP4,
            out_features=self.nibbles.shape[0],
            in_features=self.nibbles.shape[1],
            bits=MXFP4_BITS,
            group_size=MXFP4_GROUP_SIZE,
        )
        return dequantize(matrix, self.parts(matrix.name), dtype)

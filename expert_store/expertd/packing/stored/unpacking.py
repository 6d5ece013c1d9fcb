"""From the pieces of a stored weight to a matrix: one function for each way to pack them.

Each gets the pieces of one matrix, or of its first rows, and goes by their shapes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from expertd.packing.schemes import MXFP4
from expertd.packing.stored.matrix import StoredMatrix
from expertd.packing.stored.weight import Packing, StoredWeight
from expertstore.pack.codec import E8M0_BIAS, E8M0_NAN

READ_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "F4": torch.uint8,
}
"""As what the types that only stored weights come in are read, by safetensors' names."""

Pieces = Mapping[str, Tensor]
Unpack = Callable[[StoredWeight, Pieces], StoredMatrix | Tensor]


def unpack(weight: StoredWeight, pieces: Pieces) -> StoredMatrix | Tensor:
    """The matrix [out, in] of ``pieces``: as a record holds it, or float32 if none does."""
    return _UNPACK[weight.packing](weight, pieces)


def dequantized(matrix: StoredMatrix | Tensor) -> Tensor:
    """The float32 weights [out, in]."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize(torch.float32)


def _mxfp4_blocks(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    blocks = pieces["blocks"]
    return _mxfp4(weight, {"packed": blocks.flatten(-2), "scales": pieces["scales"]})


def _mxfp4(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    q = nibbles(pieces["packed"])
    return StoredMatrix(MXFP4, {"q": q, "scale": pieces["scales"]})


def nibbles(packed: Tensor) -> Tensor:
    """[rows, 2 n] of bytes [rows, n]: the low half of each is the first."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _fp8(weight: StoredWeight, pieces: Pieces) -> Tensor:
    values = pieces["weight"].float()
    rows, columns = values.shape
    height, width = weight.block
    scales = _factors(pieces["scales"]).view(-1, -(-columns // width))
    factors = scales.repeat_interleave(width, dim=1)[:, :columns]
    for begin, row in zip(range(0, rows, height), factors, strict=True):
        values[begin : begin + height] *= row
    return values


def _factors(scales: Tensor) -> Tensor:
    """Scales in float32; those that are bytes are exponents."""
    if scales.dtype != torch.uint8:
        return scales.float()
    powers = torch.ldexp(torch.ones(()), scales.int() - E8M0_BIAS)
    return powers.masked_fill(scales == E8M0_NAN, torch.nan)


_UNPACK: dict[Packing, Unpack] = {
    Packing.MXFP4_BLOCKS: _mxfp4_blocks,
    Packing.MXFP4: _mxfp4,
    Packing.FP8: _fp8,
}

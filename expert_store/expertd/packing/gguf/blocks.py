"""Blocks of GGUF's types as integers, scales and zeros, or as the weights that they stand for."""

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, quants
from torch import Tensor

from expertd.packing.gguf.types import KEPT, Type
from expertd.packing.stored.matrix import StoredMatrix


def split(kind: Type, blocks: Tensor) -> StoredMatrix:
    """Rows of blocks [rows, bytes] (uint8) of a type in :data:`KEPT`, as a record keeps them."""
    rows = blocks.shape[0]
    values = _SPLIT[kind](blocks.reshape(-1, GGML_QUANT_SIZES[kind][1]))
    return StoredMatrix(KEPT[kind], {name: part.view(rows, -1) for name, part in values.items()})


def dequantize(kind: Type, blocks: Tensor) -> Tensor:
    """The float32 weights [rows, columns] of rows of blocks, as the ``gguf`` package has them."""
    with np.errstate(all="ignore"):  # of scales that are no numbers, which is found later
        return torch.from_numpy(quants.dequantize(blocks.numpy(), kind))


def _halves(blocks: Tensor, index: int) -> Tensor:
    """The 16-bit number at ``index`` (in numbers) of each block, in float32 [n, 1]."""
    return blocks[:, 2 * index : 2 * index + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Bytes [n, m, width]: the low halves of ``width`` bytes come first, then their high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def _integers(q: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Of weights (q - middle) * scale: the zero is no part."""
    return {"q": q, "scale": scale.to(torch.float16)}


def _with_minimum(q: Tensor, scale: Tensor, minimum: Tensor) -> dict[str, Tensor]:
    """Of weights q * scale + minimum, whose zeros need not be integers."""
    zero = -minimum / scale
    # A group of equal weights, or of a scale that is nothing beside its minimum.
    flat = ~(zero.abs() <= torch.finfo(torch.float16).max)
    scale = torch.where(flat, -minimum, scale)
    zero = torch.where(flat, torch.ones_like(zero), zero)
    group = q.shape[1] // scale.shape[1]
    q = q.masked_fill(flat.repeat_interleave(group, dim=1), 0)
    return {"q": q, "scale": scale.to(torch.float16), "zero": zero.to(torch.float16)}


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    return _integers(_nibbles(blocks[:, None, 2:]), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    return _with_minimum(_nibbles(blocks[:, None, 4:]), _halves(blocks, 0), _halves(blocks, 1))


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    return _integers(blocks[:, 2:] ^ 128, _halves(blocks, 0))


def _q2_k(blocks: Tensor) -> dict[str, Tensor]:
    """16 bytes of scales (low half) and minima, 64 of integers, their two factors."""
    factors, integers = blocks[:, :16].float(), blocks[:, 16:80].view(-1, 2, 1, 32)
    scale = (factors % 16) * _halves(blocks, 40)
    minimum = -(factors / 16).floor() * _halves(blocks, 41)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    return _with_minimum((integers >> shifts & 3).flatten(1), scale, minimum)


def _q3_k(blocks: Tensor) -> dict[str, Tensor]:
    """32 bytes of high bits, 64 of the two low ones, 12 of scales, a factor."""
    high, low = blocks[:, :32].view(-1, 1, 1, 32), blocks[:, 32:96].view(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    planes = torch.arange(8, dtype=torch.uint8).view(2, 4, 1)
    q = (low >> shifts & 3) | (high >> planes & 1) << 2
    packed = blocks[:, 96:108]
    lows = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    highs = torch.cat([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale = ((lows | highs << 4).float() - 32) * _halves(blocks, 54)
    return _integers(q.flatten(1), scale)


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    """Two factors, 12 bytes of scales and minima of 6 bits, 128 of integers."""
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((first & 63, mixed & 15 | first >> 6 << 4), dim=1)
    minimum = torch.cat((second & 63, mixed >> 4 | second >> 6 << 4), dim=1)
    return _with_minimum(
        _nibbles(blocks[:, 16:].view(-1, 4, 32)),
        scale.float() * _halves(blocks, 0),
        -minimum.float() * _halves(blocks, 1),
    )


def _mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    return {"q": _nibbles(blocks[:, None, 1:]), "scale": blocks[:, :1].contiguous()}


_SPLIT: dict[Type, Callable[[Tensor], dict[str, Tensor]]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q8_0: _q8_0,
    Type.Q2_K: _q2_k,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q4_k,
    Type.MXFP4: _mxfp4,
}
"""From blocks [n, bytes] to q [n, weights], scale and zero [n, groups]."""

"""From the pieces of a stored weight to a matrix: one function for each way to pack them.

Each gets the pieces of one matrix, or of its first rows, and goes by their shapes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from expertd.packing.gguf.weight import GgufWeight
from expertd.packing.gguf.weight import unpack as unpack_blocks
from expertd.packing.schemes import MXFP4, MXFP8, NVFP4
from expertd.packing.stored.matrix import StoredMatrix
from expertd.packing.stored.weight import Packing, StoredWeight
from expertstore.errors import CheckpointError
from expertstore.pack.codec import e8m0
from expertstore.pack.layout import Encoding

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
    if isinstance(weight, GgufWeight):
        return unpack_blocks(weight, pieces)
    return _UNPACK[weight.packing](weight, pieces)


def dequantized(matrix: StoredMatrix | Tensor) -> Tensor:
    """The float32 weights [out, in]."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize(torch.float32)


def _mxfp4_blocks(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    blocks = pieces["blocks"]
    return _mxfp4(weight, {"packed": blocks.flatten(-2), "scales": pieces["scales"]})


def _mxfp4(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    return StoredMatrix(MXFP4, {"q": nibbles(pieces["packed"]), "scale": pieces["scales"]})


def _nvfp4(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    q, scales = nibbles(pieces["packed"]), pieces["scales"].view(torch.uint8)
    factor = pieces["global"].float().view(1)
    if weight.packing is Packing.NVFP4_DIVISOR:
        factor = 1 / factor
    return StoredMatrix(NVFP4, {"q": q, "scale": scales, "global": factor.repeat(len(q))})


def nibbles(packed: Tensor) -> Tensor:
    """[rows, 2 n] of bytes [rows, n]: the low half of each is the first."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _integers(weight: StoredWeight, pieces: Pieces) -> StoredMatrix | Tensor:
    bits, scales = weight.bits, pieces["scales"]
    zeros = torch.full(scales.shape, 1 << bits - 1, dtype=torch.uint8)
    if (found := pieces.get("zeros")) is not None:
        if found.dtype == torch.int8:
            zeros = (found.short() + (1 << bits - 1)).to(torch.uint8)
        else:
            zeros = _unpack_words(found.T, bits)[:, : scales.shape[0]].T
    packed = pieces["packed"]
    if packed.dtype == torch.int8:
        q = packed.view(torch.uint8) ^ 128  # 128 more
    else:
        q = _unpack_words(packed, bits)
    return _grouped(weight, q, scales, zeros, pieces.get("order"))


def _gptq(weight: StoredWeight, pieces: Pieces) -> StoredMatrix | Tensor:
    bits, scales = weight.bits, pieces["scales"].T
    zeros = _unpack_words(pieces["zeros"], bits)[:, : scales.shape[0]].T
    if weight.packing is Packing.GPTQ:
        zeros = zeros + 1 & (1 << bits) - 1
    q = _unpack_words(pieces["packed"].T, bits)
    order = pieces.get("order")
    size = weight.shape[1] // weight.pieces["scales"].entry.shape[0]
    if order is not None and weight.form is not None:
        if not torch.equal(order.long(), torch.arange(len(order)) // size):
            raise CheckpointError(
                f"{weight.pieces['order'].name} groups inputs by activation order, and the "
                'configuration does not say so: set "desc_act" to true in it.'
            )
        order = None
    return _grouped(weight, q, scales, zeros, order)


def _awq(weight: StoredWeight, pieces: Pieces) -> StoredMatrix | Tensor:
    q, zeros = (
        _unpack_words(pieces[part], weight.bits)
        .view(len(pieces[part]), -1, 8)[:, :, _AWQ_PLACES]
        .flatten(1)
        for part in ("packed", "zeros")
    )
    return _grouped(weight, q.T, pieces["scales"].T, zeros.T, None)


_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in its word each of eight columns is."""


def _grouped(
    weight: StoredWeight, q: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None
) -> StoredMatrix | Tensor:
    """Of integers [out, in], and scales and zeros [out, groups].

    ``order`` has the group of each input, where these do not follow each other.
    """
    size = q.shape[1] // scales.shape[1]
    if weight.form is None:
        inputs = torch.arange(q.shape[1]) // size if order is None else order.long()
        return (q.float() - zeros.float()[:, inputs]) * scales.float()[:, inputs]
    precision = weight.form.precision
    repeats = size // precision.group_size
    scales = scales.repeat_interleave(repeats, dim=1)
    if precision.encoding is Encoding.INT:
        # In more bits, if there are, the one zero is larger.
        q = q + ((1 << precision.bits - 1) - (1 << weight.bits - 1))
        return StoredMatrix(precision, {"q": q, "scale": scales})
    zeros = zeros.to(torch.float16).repeat_interleave(repeats, dim=1)
    return StoredMatrix(precision, {"q": q.contiguous(), "scale": scales, "zero": zeros})


def _unpack_words(words: Tensor, bits: int) -> Tensor:
    """The integers (uint8) [rows, n] of int32 [rows, n * bits / 32], from the lowest bits on."""
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    if bits == 4:
        return nibbles(words.contiguous().view(torch.uint8))
    count = words.shape[1] * 32 // bits
    first = torch.arange(count) * bits
    # The two words in which an integer may lie, as one of 64 bits.
    wide = words.long() & 0xFFFFFFFF
    pairs = wide | torch.cat((wide[:, 1:], torch.zeros_like(wide[:, :1])), dim=1) << 32
    return (pairs[:, first // 32] >> first % 32 & (1 << bits) - 1).to(torch.uint8)


def _fp8(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    assert weight.form is not None, "all FP8 has one"
    precision = weight.form.precision
    q, scales = pieces["weight"].view(torch.uint8), pieces["scales"]
    scales = e8m0(scales) if scales.dtype == torch.uint8 else scales.float()
    scales = scales.view(-1, -(-q.shape[1] // precision.group_size))
    return StoredMatrix(precision, {"q": q, "scale": scales})


def _mxfp8(weight: StoredWeight, pieces: Pieces) -> StoredMatrix:
    q = pieces["weight"].view(torch.uint8)
    return StoredMatrix(MXFP8, {"q": q, "scale": pieces["scales"]})


_UNPACK: dict[Packing, Unpack] = {
    Packing.MXFP4_BLOCKS: _mxfp4_blocks,
    Packing.MXFP4: _mxfp4,
    Packing.INTEGERS: _integers,
    Packing.GPTQ: _gptq,
    Packing.GPTQ_V2: _gptq,
    Packing.AWQ: _awq,
    Packing.NVFP4: _nvfp4,
    Packing.NVFP4_DIVISOR: _nvfp4,
    Packing.FP8: _fp8,
    Packing.MXFP8: _mxfp8,
}

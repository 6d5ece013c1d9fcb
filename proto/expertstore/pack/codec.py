"""The bits of a quantized matrix, and the reference that turns them back into weights.

Rows that lie half, a quarter or an eighth of the matrix apart share bytes; the first of them
has the highest bits. 4, 2 and 8 bit are the bytes of HQQ's ``BitPack``. 3 bit is two planes,
one below the other: the low two bits as a 2-bit matrix, then the high bits as a 1-bit one::

    bits  byte row r of a matrix of N rows holds rows                    byte rows
    8     r                                                              N
    4     r, r + N/2                                                     N/2
    2     r, r + N/4, r + 2N/4, r + 3N/4                                 N/4
    3     r ... (low two bits, as 2), then r ... r + 7N/8 (high bit)     N/4 + N/8

So of [2I, H] gate-and-up weights a 4-bit byte has gate row r in its high and up row r in its
low half, and 3 bits take 3.0 bits instead of the 3.2 of HQQ's ten to an int32. The nibbles of
MXFP4 and NVFP4 lie as those of 4 bit do; they stand for :data:`E2M1`, not for an integer. Bytes of
FP8 and MXFP8 stand for torch's ``float8_e4m3fn``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from expertstore.pack.layout import ROWS_PER_BYTE, Encoding, Matrix, RecordLayout

TORCH_DTYPES: dict[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""torch's types by safetensors' names."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What nibbles of MXFP4 and NVFP4 stand for: one bit of sign, two of exponent, one of mantissa."""

E8M0_BIAS = 127
E8M0_NAN = 255
"""A scale of MXFP4 and MXFP8 is 2 ** (byte - 127); the last byte is not a number."""


def encode(q: Tensor, bits: int) -> Tensor:
    """Packs ``q`` [N, in] (uint8, each below 2 ** bits) to bytes [N * bits / 8, in].

    Raises ValueError if N is not a multiple of ``ROWS_PER_BYTE[bits]``.
    """
    if bits not in ROWS_PER_BYTE or q.shape[0] % ROWS_PER_BYTE[bits]:
        raise ValueError(f"{q.shape[0]} rows cannot be written in {bits} bits")
    if bits == 8:
        return q.contiguous()
    if bits == 3:
        return torch.cat((_pack_plane(q & 3, 2), _pack_plane(q >> 2, 1)))
    return _pack_plane(q, bits)


def decode(packed: Tensor, bits: int) -> Tensor:
    """The integers [N, in] (uint8) that :func:`encode` packed."""
    if bits == 8:
        return packed
    if bits == 3:
        num_low = packed.shape[0] * 2 // 3
        return _unpack_plane(packed[:num_low], 2) | _unpack_plane(packed[num_low:], 1) << 2
    return _unpack_plane(packed, bits)


def dequantize(matrix: Matrix, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weights [out, in] of ``matrix`` in ``dtype``, from its parts by their full names.

    Computed in float32 and rounded once: the reference for every kernel.
    """
    if matrix.encoding is Encoding.PLAIN:
        return parts[f"{matrix.name}.weight"].to(dtype)
    values = _values(matrix, decode(parts[f"{matrix.name}.q"], matrix.bits))
    scale = _scales(matrix, parts)
    if matrix.encoding is Encoding.FP8:
        scale = scale.repeat_interleave(matrix.group_rows, 0)[: matrix.out_features]
        scale = scale.repeat_interleave(matrix.group_size, 1)[:, : matrix.in_features]
        return (values * scale).to(dtype)
    groups = (matrix.out_features, matrix.in_features // matrix.group_size, 1)
    values = values.view(*groups[:2], matrix.group_size)
    if matrix.encoding is Encoding.HQQ:
        values = values - _per_group(matrix, parts, "zero").view(groups)
    weight = values * scale.view(groups)
    return weight.view(matrix.out_features, matrix.in_features).to(dtype)


def e4m3(codes: Tensor) -> Tensor:
    """The float32 values of FP8 numbers: four bits of exponent, three of mantissa."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def e8m0(codes: Tensor) -> Tensor:
    """The float32 powers of two of bytes that are exponents; the last byte is NaN."""
    powers = torch.ldexp(torch.ones(codes.shape), codes.int() - E8M0_BIAS)
    return powers.masked_fill(codes == E8M0_NAN, torch.nan)


def record_parts(record: bytes | bytearray | memoryview, layout: RecordLayout) -> dict[str, Tensor]:
    """The parts of ``record`` by name, as views of its bytes."""
    return {
        part.name: torch.frombuffer(
            record,
            dtype=TORCH_DTYPES[part.dtype],
            count=part.num_bytes // TORCH_DTYPES[part.dtype].itemsize,
            offset=part.offset,
        ).view(part.shape)
        for part in layout.parts
    }


def _values(matrix: Matrix, q: Tensor) -> Tensor:
    """The float32 values [out, in] of codes, before scale and HQQ's zero."""
    if matrix.encoding in {Encoding.MXFP4, Encoding.NVFP4}:
        return torch.tensor(E2M1)[q.int()]
    if matrix.encoding in {Encoding.FP8, Encoding.MXFP8}:
        return e4m3(q)
    values = q.to(torch.float32)
    return values - (1 << matrix.bits - 1) if matrix.encoding is Encoding.INT else values


def _scales(matrix: Matrix, parts: Mapping[str, Tensor]) -> Tensor:
    """The float32 scales of the matrix's groups or blocks."""
    if matrix.encoding in {Encoding.MXFP4, Encoding.MXFP8}:
        return e8m0(parts[f"{matrix.name}.scale"])
    if matrix.encoding is Encoding.NVFP4:
        return e4m3(parts[f"{matrix.name}.scale"]) * parts[f"{matrix.name}.global"].view(-1, 1)
    return _per_group(matrix, parts, "scale")


def _per_group(matrix: Matrix, parts: Mapping[str, Tensor], which: str) -> Tensor:
    """The float32 scale or zero [out, in / group_size]."""
    name = f"{matrix.name}.{which}"
    if not matrix.meta_group_size:
        return parts[name].to(torch.float32)
    q = parts[f"{name}.q"].to(torch.float32)
    scale = parts[f"{name}.scale"].to(torch.float32).view(-1, 1)
    zero = parts[f"{name}.zero"].to(torch.float32).view(-1, 1)
    return ((q.view(-1, matrix.meta_group_size) - zero) * scale).view(q.shape)


def _pack_plane(q: Tensor, bits: int) -> Tensor:
    """``q`` [N, in], each below 2 ** bits, to bytes [N * bits / 8, in]."""
    blocks = q.chunk(8 // bits)
    packed = torch.zeros_like(blocks[0])
    for block in blocks:
        packed = packed << bits | block
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_pack_plane`."""
    mask = (1 << bits) - 1
    return torch.cat([packed >> shift & mask for shift in range(8 - bits, -1, -bits)])

"""A matrix in each form that a record knows, and random parts of one."""

import math

import torch
from torch import Tensor

from expertstore.pack.codec import E2M1, E8M0_BIAS, TORCH_DTYPES, e4m3, encode
from expertstore.pack.layout import FIXED_FORMS, Encoding, Matrix, matrix_parts


def form(
    encoding: Encoding,
    out_features: int,
    in_features: int,
    *,
    name: str = "down",
    bits: int = 4,
    group_size: int = 32,
    group_rows: int = 1,
) -> Matrix:
    """A matrix in ``encoding``; bits and groups are taken where it leaves a choice."""
    if encoding is Encoding.PLAIN:
        bits, group_size = 0, 0
    if encoding is Encoding.FP8:
        bits = 8
    bits, group_size = FIXED_FORMS.get(encoding, (bits, group_size))
    return Matrix(
        name=name,
        encoding=encoding,
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        group_size=group_size,
        group_rows=group_rows if encoding is Encoding.FP8 else 1,
    )


def random_parts(
    matrix: Matrix, generator: torch.Generator, scales: str = "F16"
) -> dict[str, Tensor]:
    """Parts of a quantized ``matrix`` without meta groups, with variance of about 1 / in_features.

    All codes that are numbers occur, and scales that differ by a factor of 4. ``scales`` is the
    type of HQQ's and INT's.
    """
    codes = torch.randint(
        1 << matrix.bits, (matrix.out_features, matrix.in_features), generator=generator
    ).to(torch.uint8)
    values = codes.float() - (1 << matrix.bits - 1)
    if matrix.encoding in {Encoding.MXFP4, Encoding.NVFP4}:
        values = torch.tensor(E2M1)
    elif matrix.encoding in {Encoding.FP8, Encoding.MXFP8}:
        codes = torch.where(codes & 0x7F == 0x7F, codes - 1, codes)
        values = e4m3(codes)
    typical = 1 / math.sqrt(matrix.in_features) / float(values.square().mean().sqrt())
    parts = {f"{matrix.name}.q": encode(codes, matrix.bits)}
    for part, shape, dtype in matrix_parts(matrix, "", scales)[1:]:
        spread = 2 ** (2 * torch.rand(shape, generator=generator) - 1)
        if part.endswith(".zero"):
            parts[part] = ((1 << matrix.bits - 1) * spread).half()
        elif part.endswith(".global"):
            parts[part] = spread * typical / 16
        elif matrix.encoding is Encoding.NVFP4:
            parts[part] = (16 * spread).to(torch.float8_e4m3fn).view(torch.uint8)
        elif dtype == "U8":
            exponents = (spread * typical).log2().round() + E8M0_BIAS
            parts[part] = exponents.to(torch.uint8)
        else:
            parts[part] = (spread * typical).to(TORCH_DTYPES[dtype])
    return parts

"""A matrix in each form that a record knows, by name as well, and random parts of one."""

import math
import re

import torch
from torch import Tensor

from expertd.packing.schemes import parse_precision
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


def named(text: str, name: str, out_features: int, in_features: int) -> Matrix:
    """A matrix by the name of its form.

    mxfp4, nvfp4 and mxfp8 are kept as they came, and so are fp8:128x64, of blocks of 128 rows and
    64 columns, and int4g32, of 4 bits in groups of 32; others are precisions such as 4g64.
    """
    if blocks := re.fullmatch(r"fp8:(\d+)x(\d+)", text):
        kept, choice = Encoding.FP8, {"group_rows": int(blocks[1]), "group_size": int(blocks[2])}
    elif groups := re.fullmatch(r"int(\d)g(\d+)", text):
        kept, choice = Encoding.INT, {"bits": int(groups[1]), "group_size": int(groups[2])}
    elif text in {each.value for each in FIXED_FORMS}:
        kept, choice = Encoding(text), {}
    else:
        return parse_precision(text).matrix(name, out_features, in_features)
    return form(kept, out_features, in_features, name=name, **choice)


def is_kept(matrix: Matrix) -> bool:
    """Whether nothing is made a matrix in such a form: it came so."""
    return matrix.encoding not in {Encoding.PLAIN, Encoding.HQQ}


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

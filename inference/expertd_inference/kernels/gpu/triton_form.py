"""What a kernel must know of a matrix when it is compiled.

A model has a handful of forms (gate-and-up, down, and those of its trunk), so shapes and the
places of parts are compiled in: divisions become shifts, and the compiler sees which loads are
aligned. :class:`Form` is a named tuple since Triton takes those as constants.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import language as tl

from expertstore.pack.layout import (
    DTYPE_BYTES,
    ROWS_PER_BYTE,
    Encoding,
    Matrix,
    RecordLayout,
    has_float_scales,
    scale_part,
)

TRITON_DTYPES: dict[torch.dtype, tl.dtype] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_PLAIN_DTYPES = {"F32": tl.float32, "F16": tl.float16, "BF16": tl.bfloat16}
_PLAIN_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


SPAN = 16
"""Bytes that a thread reads at once."""

_Part = TypeVar("_Part")


class Places(NamedTuple):
    """The byte offset in a record of each part of a matrix; 0 where there is none."""

    q: int = 0
    """Of the weights, if they are plain."""
    scale: int = 0
    zero: int = 0
    scale_scale: int = 0
    scale_zero: int = 0
    zero_scale: int = 0
    zero_zero: int = 0
    bias: int = 0


PART_SUFFIXES = (
    "q",
    "scale",
    "zero",
    "scale.scale",
    "scale.zero",
    "zero.scale",
    "zero.zero",
    "bias",
)
"""The parts' names after their matrix's, in the order of :class:`Places`."""


def find_part(parts: Mapping[str, _Part], matrix: str, suffix: str) -> _Part | None:
    """The part that kernels read in the place of ``suffix``; None if there is none."""
    # q may be plain weights, and scale and zero may be 8-bit with a scale and zero of their own,
    # or the former with a global scale.
    names = {"q": ("weight", "q"), "scale.scale": ("global", suffix)}
    for name in names.get(suffix, (f"{suffix}.q", suffix)):
        if f"{matrix}.{name}" in parts:
            return parts[f"{matrix}.{name}"]
    return None


class Form(NamedTuple):
    """A matrix of ``rows`` by ``columns`` as its kernel is compiled for it."""

    encoding: str
    bits: int
    """16 or 32 if plain."""
    rows: int
    columns: int
    group: int
    """Weights along a row that share a scale."""
    meta: int
    group_rows: int
    """Rows that share a scale."""
    has_bias: bool
    dtype: tl.dtype
    """Of plain weights and of the bias."""
    at: Places = Places()
    scales: tl.dtype = tl.float16
    """Of what scales the weights, in a record."""

    @property
    def span(self) -> int:
        """Columns that a thread reads at once: 16 bytes, the widest load."""
        return SPAN * 8 // self.bits if self.encoding == "plain" else SPAN

    @property
    def has_rest(self) -> bool:
        """Whether a weight has more bits than a tensor core's 16-bit floats."""
        return self.encoding not in {"plain", "mxfp4", "mxfp8"}

    @property
    def has_byte_scales(self) -> bool:
        """Whether a scale is a byte, which is decoded."""
        return self.meta > 0 or self.encoding in {"mxfp4", "nvfp4", "mxfp8"}

    @property
    def rows_per_unit(self) -> int:
        """Rows that share bytes."""
        return 1 if self.encoding == "plain" else ROWS_PER_BYTE[self.bits]


def record_form(layout: RecordLayout, name: str) -> Form:
    """The form of the matrix ``name`` of such records. Raises ValueError if there is no kernel."""
    matrix = layout.matrix(name)
    parts = {part.name: part for part in layout.parts}
    found = [find_part(parts, name, suffix) for suffix in PART_SUFFIXES]
    places = Places(*(part.offset if part else 0 for part in found))
    bias = parts.get(f"{name}.bias")
    plain = parts.get(f"{name}.weight")
    own = plain or bias
    dtype = own.dtype if own else "BF16"
    form = _form(matrix, dtype, bias is not None)._replace(at=places)
    if has_float_scales(matrix):
        form = form._replace(scales=_PLAIN_DTYPES[parts[scale_part(matrix)].dtype])
    elif matrix.encoding in {Encoding.FP8, Encoding.NVFP4}:
        form = form._replace(scales=tl.float32)
    return form


def weight_form(matrix: Matrix, parts: Mapping[str, Tensor]) -> Form:
    """The form of a matrix of the trunk, whose parts are tensors of their own."""
    plain = parts.get(f"{matrix.name}.weight")
    dtype = "BF16" if plain is None else _PLAIN_NAMES.get(plain.dtype, str(plain.dtype))
    return _form(matrix, dtype, has_bias=False)


def _form(matrix: Matrix, dtype: str, has_bias: bool) -> Form:
    if dtype not in _PLAIN_DTYPES:
        raise ValueError(f"{matrix.name} is of {dtype}, for which there is no GPU kernel")
    plain = matrix.encoding is Encoding.PLAIN
    group = min(matrix.group_size, matrix.in_features)
    if not plain and (matrix.in_features % SPAN or group % SPAN):
        raise ValueError(
            f"{matrix.name} has {matrix.in_features} columns, and a scale for {group} of them; a "
            f"GPU kernel wants multiples of {SPAN}"
        )
    return Form(
        encoding=str(matrix.encoding),
        bits=8 * DTYPE_BYTES[dtype] if plain else matrix.bits,
        rows=matrix.out_features,
        columns=matrix.in_features,
        group=matrix.group_size or matrix.in_features,
        meta=matrix.meta_group_size,
        group_rows=matrix.group_rows,
        has_bias=has_bias,
        dtype=_PLAIN_DTYPES[dtype],
    )

"""How the bytes of a record are divided into parts.

A record is one expert. Its parts lie one after the other, each on a 64-byte boundary::

    gate_up.q │ gate_up.scale │ gate_up.zero │ down.q │ down.scale │ down.zero │ padding

``gate_up`` is [2I, H], gate rows before up rows whatever the model's own order, and ``down``
is [H, I]. Experts without a gate have ``up``, [I, H], in the place of ``gate_up``. A matrix is
quantized in groups of ``group_size`` weights along its input dimension: ``w = (q - zero) * scale``,
with a scale and a zero per group; or it came in a form that is kept as it is (:class:`Encoding` has
them all). The integers are packed along the output dimension (:mod:`expertstore.pack.codec` has the
bits), so a part of q is a byte matrix of ``out_features * bits / 8`` rows.

Everything here is plain data: no torch, no numpy.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

PAGE_BYTES = 4096
PART_ALIGNMENT = 64
"""A cache line, and what the widest vector load wants."""

DTYPE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8, "F64": 8}
"""Size of a value, by safetensors' name of its type."""

SCALE_TYPES = {"F16", "BF16"}
"""Of HQQ's and INT's scales: BF16 where the weights are far larger or smaller than usual, or come
with such scales."""

ROWS_PER_BYTE = {8: 1, 4: 2, 3: 8, 2: 4}
"""By bit width, what the number of rows must be a multiple of: rows share bytes."""

GATE_UP, UP, DOWN = "gate_up", "up", "down"
"""An expert's matrices: what its rows enter by, GATE_UP or without a gate UP, and then DOWN."""

MXFP4_BITS = 4
MXFP4_GROUP_SIZE = 32
"""Of the OCP Microscaling formats' MXFP4; no other is one."""

Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 48)]


class Encoding(StrEnum):
    """How a matrix's weights are written."""

    PLAIN = "plain"
    """The tensor itself."""
    HQQ = "hqq"
    """q, scale and zero with w = (q - zero) * scale, groups along the input dimension."""
    INT = "int"
    """q and scale with w = (q - 2 ** (bits - 1)) * scale: as HQQ, with one zero for all."""
    MXFP4 = "mxfp4"
    """q and scale with w = e2m1(q) * 2 ** (scale - 127): the OCP Microscaling format, whose 4 bits
    are a sign, two bits of exponent and one of mantissa, in groups of 32."""
    NVFP4 = "nvfp4"
    """q, scale and global with w = e2m1(q) * (e4m3(scale) * global), in groups of 16: NVIDIA's
    form, whose global scale is a whole tensor's; a row here has its own, so that matrices of
    several tensors can be one."""
    FP8 = "fp8"
    """q and scale with w = e4m3(q) * scale: 8 bits are a sign, four bits of exponent, bias 7, and
    three of mantissa (no infinities, 0x7f and 0xff are NaN). A block of ``group_rows`` x
    ``group_size`` weights has a scale; so has a row, or a tensor, if blocks are as large."""
    MXFP8 = "mxfp8"
    """q and scale with w = e4m3(q) * 2 ** (scale - 127), in groups of 32: OCP Microscaling's."""


FIXED_FORMS = {
    Encoding.MXFP4: (MXFP4_BITS, MXFP4_GROUP_SIZE),
    Encoding.NVFP4: (4, 16),
    Encoding.MXFP8: (8, 32),
}
"""Bits and group size of encodings that have no others."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all structures of the manifest are: immutable, and strict about their fields."""


class Part(Struct, frozen=True):
    """A contiguous piece of a record; ``dtype`` in safetensors' names (U8, F16, BF16, F32)."""

    name: str
    offset: Bytes
    num_bytes: Bytes
    shape: tuple[Count, ...]
    dtype: str


class Matrix(Struct, frozen=True):
    """A matrix ``[out_features, in_features]``: one of an expert's, or one of the trunk's.

    ======================  ============================  =====  ==========================
    part                    shape                         dtype  where
    ======================  ============================  =====  ==========================
    ``NAME.weight``         [out, in]                     model  plain
    ``NAME.q``              [out * bits / 8, in]          U8     all others
    ``NAME.scale, .zero``   [out, in / group_size]        F16 *  HQQ without meta groups
    ``NAME.scale.q``        [out, in / group_size]        U8     HQQ with meta groups, and
                                                                 so for ``NAME.zero``
    ``NAME.scale.scale``    [out * in / group_size /      F16 *  the same; ``.zero`` too
                            meta_group_size]
    ``NAME.scale``          [out, in / group_size]        F16 *  INT
    ``NAME.scale``          [out, in / group_size]        U8     MXFP4, MXFP8: e8m0
    ``NAME.scale``          [out, in / 16]                U8     NVFP4: e4m3
    ``NAME.global``         [out]                         F32    NVFP4
    ``NAME.scale``          [out / group_rows,            F32    FP8; both rounded up: the
                            in / group_size]                     last blocks may be smaller
    ``NAME.bias``           [out]                         model  experts with biases
    ======================  ============================  =====  ==========================

    Meta groups run over the flattened ``NAME.scale.q``: element i belongs to group
    ``i // meta_group_size``. ``meta_group_size`` is 0 where scale and zero are F16. FIXED_FORMS
    have bits and a group size of their own; only HQQ has meta groups, and only FP8 ``group_rows``
    other than 1.

    * What scales the weights (``NAME.scale``, ``NAME.scale.scale``) is BF16 where these are far
    larger or smaller than usual; zeros count in steps of it, and stay F16.
    """

    name: str
    encoding: Encoding
    out_features: Count
    in_features: Count
    bits: Annotated[int, Meta(ge=0, le=8)] = 0
    group_size: Annotated[int, Meta(ge=0)] = 0
    meta_group_size: Annotated[int, Meta(ge=0)] = 0
    group_rows: Annotated[int, Meta(ge=1)] = 1


class RecordLayout(Struct, frozen=True):
    """How the bytes of a record are divided; ``record_bytes`` is a multiple of 4 KiB."""

    record_bytes: Count
    parts: tuple[Part, ...]
    matrices: tuple[Matrix, ...]

    @property
    def is_gated(self) -> bool:
        """Whether the expert multiplies what is activated, gate, by up."""
        return any(matrix.name == GATE_UP for matrix in self.matrices)

    @property
    def inward(self) -> Matrix:
        """The matrix that rows enter by. ``KeyError`` if the record is none of an expert."""
        return self.matrix(GATE_UP if self.is_gated else UP)

    def part(self, name: str) -> Part:
        """The part of that name; ``KeyError`` if there is none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def matrix(self, name: str) -> Matrix:
        """The matrix of that name; ``KeyError`` if there is none."""
        for matrix in self.matrices:
            if matrix.name == name:
                return matrix
        raise KeyError(name)


def matrix_parts(
    matrix: Matrix, dtype: str, scales: str = "F16"
) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each part of ``matrix``, without bias.

    ``dtype`` is the model's, ``scales`` one of SCALE_TYPES. Raises ValueError if the matrix cannot
    be written so.
    """
    shape = (matrix.out_features, matrix.in_features)
    if matrix.encoding is Encoding.PLAIN:
        return [(f"{matrix.name}.weight", shape, dtype)]
    _check_form(matrix)
    columns = -(-matrix.in_features // matrix.group_size)
    groups = (-(-matrix.out_features // matrix.group_rows), columns)
    q_shape = (matrix.out_features * matrix.bits // 8, matrix.in_features)
    parts: list[tuple[str, tuple[int, ...], str]] = [(f"{matrix.name}.q", q_shape, "U8")]
    if matrix.encoding is not Encoding.HQQ:
        own = {Encoding.INT: scales, Encoding.FP8: "F32"}.get(matrix.encoding, "U8")
        parts.append((f"{matrix.name}.scale", groups, own))
        if matrix.encoding is Encoding.NVFP4:
            parts.append((f"{matrix.name}.global", (matrix.out_features,), "F32"))
        return parts
    for name in (f"{matrix.name}.scale", f"{matrix.name}.zero"):
        own = scales if name.endswith(".scale") else "F16"
        if not matrix.meta_group_size:
            parts.append((name, groups, own))
            continue
        if math.prod(groups) % matrix.meta_group_size:
            raise ValueError(
                f"the meta group size {matrix.meta_group_size} does not divide the "
                f"{math.prod(groups)} groups of {matrix.name}"
            )
        meta_groups = (math.prod(groups) // matrix.meta_group_size,)
        parts.append((f"{name}.q", groups, "U8"))
        parts += [(f"{name}.scale", meta_groups, own), (f"{name}.zero", meta_groups, "F16")]
    return parts


def _check_form(matrix: Matrix) -> None:
    """Raises ValueError unless the encoding has such bits and groups, and they fit the shape."""
    name, encoding = matrix.name, matrix.encoding
    fixed = FIXED_FORMS.get(encoding)
    if fixed is not None and (matrix.bits, matrix.group_size) != fixed:
        raise ValueError(
            f"{name} is {encoding.upper()}, which has {fixed[0]} bits and groups of {fixed[1]}"
        )
    if encoding is Encoding.FP8 and matrix.bits != 8:
        raise ValueError(f"{name} is FP8 and has {matrix.bits} bits")
    if encoding is not Encoding.HQQ and matrix.meta_group_size:
        raise ValueError(f"{name} is {encoding.upper()}, which has no meta groups")
    if encoding is not Encoding.FP8 and matrix.group_rows != 1:
        raise ValueError(f"{name} is {encoding.upper()}, whose groups have one row")
    rows_per_byte = ROWS_PER_BYTE.get(matrix.bits)
    if rows_per_byte is None:
        raise ValueError(f"{name} has {matrix.bits} bits; known are 2, 3, 4 and 8")
    if matrix.out_features % rows_per_byte:
        raise ValueError(
            f"{name} has {matrix.out_features} rows, and {matrix.bits} bits need a "
            f"multiple of {rows_per_byte}"
        )
    divides = matrix.group_size and not matrix.in_features % matrix.group_size
    if not matrix.group_size or (encoding is not Encoding.FP8 and not divides):
        raise ValueError(
            f"the group size {matrix.group_size} does not divide the {matrix.in_features} "
            f"inputs of {name}"
        )


def has_float_scales(matrix: Matrix) -> bool:
    """Whether the type of the matrix's scales is one of SCALE_TYPES."""
    return matrix.encoding in {Encoding.HQQ, Encoding.INT}


def scale_part(matrix: Matrix) -> str:
    """The full name of what scales a quantized matrix: its scales, or those of its meta groups."""
    return f"{matrix.name}.scale.scale" if matrix.meta_group_size else f"{matrix.name}.scale"


def scale_types(name: str, dtype: str) -> set[str]:
    """The types that the part ``name`` may have, by the one that :func:`matrix_parts` gives it."""
    own = dtype == "F16" and name.endswith(".scale") and not name.endswith(".zero.scale")
    return SCALE_TYPES if own else {dtype}


def record_layout(
    matrices: tuple[Matrix, ...],
    dtype: str,
    *,
    has_bias: bool,
    scales: Sequence[str] | None = None,
) -> RecordLayout:
    """The record that holds ``matrices`` in this order, each with its bias if ``has_bias``.

    ``dtype`` is the model's, of plain matrices and biases, and ``scales`` one of SCALE_TYPES for
    each matrix, by default F16. Raises ValueError if a matrix cannot be written so.
    """
    parts: list[Part] = []
    end = 0
    for matrix, own in zip(matrices, scales or ["F16"] * len(matrices), strict=True):
        pieces = matrix_parts(matrix, dtype, own)
        if has_bias:
            pieces.append((f"{matrix.name}.bias", (matrix.out_features,), dtype))
        for name, shape, part_dtype in pieces:
            offset = round_up(end, PART_ALIGNMENT)
            num_bytes = math.prod(shape) * DTYPE_BYTES[part_dtype]
            parts.append(
                Part(name=name, offset=offset, num_bytes=num_bytes, shape=shape, dtype=part_dtype)
            )
            end = offset + num_bytes
    return RecordLayout(
        record_bytes=round_up(end, PAGE_BYTES), parts=tuple(parts), matrices=matrices
    )


def check_layout(layout: RecordLayout) -> None:
    """Raises ValueError unless the parts are those of the matrices and lie inside the record."""
    if layout.record_bytes % PAGE_BYTES:
        raise ValueError("a record's size is not a multiple of 4 KiB")
    end = 0
    parts = {}
    for part in layout.parts:
        if part.dtype not in DTYPE_BYTES:
            raise ValueError(f"part {part.name} has the unknown type {part.dtype}")
        if part.num_bytes != math.prod(part.shape) * DTYPE_BYTES[part.dtype]:
            raise ValueError(f"part {part.name} has a size that is not its shape's")
        if part.offset < end or part.offset % PART_ALIGNMENT:
            raise ValueError(f"part {part.name} is misplaced")
        end = part.offset + part.num_bytes
        if end > layout.record_bytes:
            raise ValueError(f"part {part.name} reaches past the record")
        if part.name in parts:
            raise ValueError(f"part {part.name} is there twice")
        parts[part.name] = part
    for matrix in layout.matrices:
        for name, shape, dtype in matrix_parts(matrix, ""):
            found = parts.pop(name, None)
            allowed = scale_types(name, dtype)
            if found is None or found.shape != shape or (dtype and found.dtype not in allowed):
                raise ValueError(f"part {name} is missing or not of its matrix's shape")
        bias = parts.pop(f"{matrix.name}.bias", None)
        if bias is not None and bias.shape != (matrix.out_features,):
            raise ValueError(f"part {bias.name} is not of its matrix's shape")
    if parts:
        raise ValueError(f"part {next(iter(parts))} belongs to no matrix")


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple

"""From bytes to values inside a Triton kernel: every encoding of a pack, in registers.

Rows share bytes (:mod:`expertstore.pack.codec` has the picture). A *unit* is what has to be read
to have whole bytes: byte row r of a matrix of N rows, which gives the ``planes`` rows
``r + j * N / planes``. A 4-bit unit of gate and up is thus a gate row and the up row that it is
multiplied with, a 2-bit one two of each; 3 bits take three byte rows to a unit of eight rows.
Where rows share no bytes (16 and 8 bit) a unit of gate and up is made of two byte rows.

All these functions are Triton's, compiled into the kernels that call them. They return in one
place: Triton leaves out what a constant condition excludes, but not what follows a return. ``F``
is the matrix's :class:`~expertd_inference.kernels.gpu.triton_form.Form`.
"""

import triton
from triton import language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, whose bfloat16 has neither rounding nor products."""


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 ``x`` to the nearest of ``DTYPE``, ties to even, as torch rounds."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter cuts bits off. NaN would become an infinity by the addition.
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def record_parts(record, F: tl.constexpr):
    """The parts of a matrix in a record, pointers in the order of ``Places``."""
    if F.encoding == "plain":
        weight = (record + F.at.q).to(tl.pointer_type(F.dtype))
        scale = record
    elif F.has_byte_scales:
        weight = record + F.at.q
        scale = record + F.at.scale
    else:
        weight = record + F.at.q
        scale = (record + F.at.scale).to(tl.pointer_type(F.scales))
    if F.encoding == "hqq" and not F.meta:
        zero = (record + F.at.zero).to(tl.pointer_type(tl.float16))
    else:
        zero = record + F.at.zero
    half: tl.constexpr = tl.pointer_type(tl.float16)
    return (
        weight,
        scale,
        zero,
        (record + F.at.scale_scale).to(tl.pointer_type(F.scales)),
        (record + F.at.scale_zero).to(half),
        (record + F.at.zero_scale).to(half),
        (record + F.at.zero_zero).to(half),
        (record + F.at.bias).to(tl.pointer_type(F.dtype)),
    )


@triton.jit
def load_unit(
    q, rows, columns, mask, F: tl.constexpr, PLANES: tl.constexpr, IN_WORDS: tl.constexpr
):
    """The bytes (or plain weights) of units ``rows`` at ``columns``: a tuple of tiles.

    ``IN_WORDS``: four bytes at a time, and ``columns`` count these.
    """
    if IN_WORDS and F.encoding != "plain":
        q = q.to(tl.pointer_type(tl.int32))
    width: tl.constexpr = F.columns // 4 if IN_WORDS and F.encoding != "plain" else F.columns
    at = rows * width + columns
    unit = (tl.load(q + at, mask=mask, other=0),)
    if F.encoding == "plain" or F.bits == 8:
        for j in tl.static_range(1, PLANES):
            unit += (tl.load(q + at + j * (F.rows // PLANES * width), mask=mask, other=0),)
    elif F.bits == 3:
        # Low bits of rows N/8 further down, and the high bits of all.
        unit += (tl.load(q + at + F.rows // 8 * width, mask=mask, other=0),)
        unit += (tl.load(q + at + F.rows // 4 * width, mask=mask, other=0),)
    return unit


@triton.jit
def plane(unit, j: tl.constexpr, F: tl.constexpr):
    """The integers (int32) of the ``j``-th row of each unit."""
    if F.bits == 8:
        q = unit[j].to(tl.int32)
    elif F.bits == 4:
        q = (unit[0].to(tl.int32) >> (4 - 4 * j)) & 15
    elif F.bits == 2:
        q = (unit[0].to(tl.int32) >> (6 - 2 * j)) & 3
    else:
        # Row r + j N/8 has its low bits in byte row r or, for odd j, r + N/8.
        q = (unit[j % 2].to(tl.int32) >> (6 - 2 * (j // 2))) & 3
        q |= ((unit[2].to(tl.int32) >> (7 - j)) & 1) << 2
    return q


@triton.jit
def e2m1(q):
    """The float32 values of 4-bit floats, times 2 ** -14.

    As the top bits of a float16 (sign, two of five exponent bits, one of mantissa) they are
    right but for the exponent's bias of 15 instead of 1, subnormal 0.5 included.
    """
    bits = ((q & 8) << 12) | ((q & 7) << 9)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3(q):
    """The float32 values of 8-bit floats.

    As a float16's exponent and mantissa they are right but for the exponent's bias of 15 instead of
    7, subnormal ones included; 127 is NaN.
    """
    bits = ((q & 128) << 8) | ((q & 127) << 7)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((q & 127) == 127, float("nan"), value)


@triton.jit
def e8m0(scale):
    """2 ** (scale - 127) as float32; 255 is NaN."""
    bits = scale.to(tl.int32)
    # 2 ** -127 is subnormal.
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def span_columns(first, F: tl.constexpr, SPANS: tl.constexpr):
    """The columns [SPANS, span] of the spans from ``first`` on, and which of them there are."""
    spans = first + tl.arange(0, SPANS)
    columns = spans[:, None] * F.span + tl.arange(0, F.span)[None, :]
    if F.columns % F.span == 0:
        # Known to hold for whole spans, so that they are read in one load.
        mask = (spans < F.columns // F.span)[:, None]
    else:
        mask = columns < F.columns
    return columns, mask


@triton.jit
def load_scales(
    parts,
    rows,  # [R, 1] units
    row_mask,
    spans,  # [1, SPANS]
    span_mask,
    first,  # the least of spans
    F: tl.constexpr,
    PLANES: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Per plane, the float32 scale and zero [R, SPANS]; nothing of what is plain."""
    row_groups: tl.constexpr = (F.columns + F.group - 1) // F.group
    groups_at_once: tl.constexpr = max(1, SPANS * F.span // F.group)
    one_each: tl.constexpr = (
        F.meta > 0 and row_groups % groups_at_once == 0 and F.meta % groups_at_once == 0
    )
    scales = ()
    for j in tl.static_range(PLANES):
        row = rows + j * (F.rows // PLANES)
        at = row // F.group_rows * row_groups + spans * F.span // F.group
        mask = row_mask & span_mask
        if F.encoding == "mxfp4" or F.encoding == "mxfp8":
            scales += ((e8m0(tl.load(parts[1] + at, mask=mask, other=0)),),)
        elif F.encoding == "nvfp4":
            scale = e4m3(tl.load(parts[1] + at, mask=mask, other=0).to(tl.int32))
            scales += ((scale * tl.load(parts[3] + row, mask=row_mask, other=0),),)
        elif F.encoding == "fp8":
            scales += ((tl.load(parts[1] + at, mask=mask, other=0),),)
        elif F.encoding == "int":
            scale = tl.load(parts[1] + at, mask=mask, other=0).to(tl.float32)
            scales += ((scale, tl.zeros_like(scale) + (1 << (F.bits - 1))),)
        elif F.encoding == "hqq":
            scale = tl.load(parts[1] + at, mask=mask, other=0).to(tl.float32)
            zero = tl.load(parts[2] + at, mask=mask, other=0).to(tl.float32)
            if F.meta:
                if one_each:
                    # No meta group ends among these spans: a row needs only one.
                    at = row * row_groups + first * F.span // F.group
                    mask = row_mask
                meta = at // F.meta
                scale -= tl.load(parts[4] + meta, mask=mask, other=0).to(tl.float32)
                scale *= tl.load(parts[3] + meta, mask=mask, other=0).to(tl.float32)
                zero -= tl.load(parts[6] + meta, mask=mask, other=0).to(tl.float32)
                zero *= tl.load(parts[5] + meta, mask=mask, other=0).to(tl.float32)
            scales += ((scale, zero),)
    return scales

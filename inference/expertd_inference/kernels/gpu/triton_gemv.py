"""Experts from device-cache slots for a few tokens: one matrix-vector product per pair.

A *pair* is a token and a position of its top k. Each block takes a pair and a few units of the
expert's matrix; it finds the expert in the routing and its slot in ``slot_of``, both on the
device, and leaves at once if there is none. So the grid does not depend on the routing and a
CUDA graph can hold the launch.

Per span of 16 weights sum(x * (q - zero)) * scale is taken apart, since the bandwidth of a large
GPU leaves three or four instructions for a 4-bit weight. A shift puts the bits of q below the
exponent of 1.0, an AND and OR in one instruction make that a float, a multiply-add sums it; what
is then wrong (the 1, the lower bits of the same byte, which are another row's, and the zero) is
made good once per span. Four bytes are taken as a word. All sums are float32, in an order that
only the block sizes decide.
"""

import triton
from torch import Tensor
from triton import language as tl

from expertd_inference.kernels.activation import Activation
from expertd_inference.kernels.gpu.triton_activation import activate, activation_constants
from expertd_inference.kernels.gpu.triton_blocks import GemvBlocks, gemv_blocks
from expertd_inference.kernels.gpu.triton_dequant import (
    load_scales,
    load_unit,
    record_parts,
    rounded,
    span_columns,
)
from expertd_inference.kernels.gpu.triton_form import TRITON_DTYPES, Form

ONE_BITS = 0x3F800000
"""1.0 as a float32's bits. An argument and no constant: in a register it is the third operand of
the instruction that cuts the bits of q out, while two constants would take two instructions."""


@triton.jit
def gemv(
    x,  # pointer to F.columns values
    parts,  # pointers, as record_parts has them
    rows,  # [ROWS] units
    one,  # ONE_BITS
    F: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """The products of ``x`` and the rows of the units: ``PLANES`` tensors [ROWS], float32.

    A step takes ``SPANS`` spans of ``F.span`` columns; a span is what a thread reads at once.
    """
    num_spans: tl.constexpr = (F.columns + F.span - 1) // F.span
    row_mask = rows < F.rows // PLANES
    sums = ()
    for _ in tl.static_range(PLANES):
        sums += (tl.zeros((ROWS, SPANS), tl.float32),)
    unit = _load_step(parts[0], rows, row_mask, 0, F, PLANES, SPANS)
    for first in tl.range(0, num_spans, SPANS):
        # Bytes are under way a step ahead, and scales before anything waits for the bytes.
        next_unit = _load_step(parts[0], rows, row_mask, first + SPANS, F, PLANES, SPANS)
        spans = first + tl.arange(0, SPANS)
        scales = load_scales(
            parts,
            rows[:, None],
            row_mask[:, None],
            spans[None, :],
            (spans < num_spans)[None, :],
            first,
            F,
            PLANES,
            SPANS,
        )
        values = _load_values(x, first, F, SPANS)
        products = _products(unit, values, scales, one, F, PLANES, x.dtype.element_ty)
        added = ()
        for j in tl.static_range(PLANES):
            added += (sums[j] + products[j],)
        sums = added
        unit = next_unit
    results = ()
    for j in tl.static_range(PLANES):
        results += (tl.sum(sums[j], axis=1),)
    return results


@triton.jit
def _load_step(
    q, rows, row_mask, first, F: tl.constexpr, PLANES: tl.constexpr, SPANS: tl.constexpr
):
    """The units' plain weights [R, SPANS, span], or their bytes in words [R, SPANS, 4]."""
    columns, mask = span_columns(first, F, SPANS)
    if F.encoding != "plain":
        spans = first + tl.arange(0, SPANS)
        columns = spans[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = row_mask[:, None, None] & mask[None, :, :]
    return load_unit(q, rows[:, None, None], columns[None, :, :], mask, F, PLANES, True)


@triton.jit
def _load_values(x, first, F: tl.constexpr, SPANS: tl.constexpr):
    """What a step's weights are multiplied with, float32: [1, SPANS, span] of plain weights.

    Of packed ones four tiles [1, SPANS, 4], of each byte of a word its own.
    """
    columns, mask = span_columns(first, F, SPANS)
    values = ()
    if F.encoding == "plain":
        values += (tl.load(x + columns, mask=mask, other=0).to(tl.float32)[None, :, :],)
    elif x.dtype.element_ty.primitive_bitwidth == 16:
        # Four at a time, so that a thread has what its word of weights needs.
        spans = first + tl.arange(0, SPANS)
        at = spans[:, None] * 4 + tl.arange(0, 4)[None, :]
        four = tl.load(x.to(tl.pointer_type(tl.int64)) + at, mask=mask, other=0)[None, :, :]
        for byte in tl.static_range(4):
            value = (four >> (16 * byte)).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
            values += (value.to(tl.float32),)
    else:
        spans = first + tl.arange(0, SPANS)
        at = spans[:, None] * 16 + 4 * tl.arange(0, 4)[None, :]
        for byte in tl.static_range(4):
            values += (tl.load(x + at + byte, mask=mask, other=0).to(tl.float32)[None, :, :],)
    return values


@triton.jit
def _products(
    unit, values, scales, one, F: tl.constexpr, PLANES: tl.constexpr, DTYPE: tl.constexpr
):
    """``values`` times the weights, per row and span: PLANES of [R, SPANS]."""
    products = ()
    if F.encoding == "plain":
        for j in tl.static_range(PLANES):
            weight = unit[j].to(tl.float32)
            if F.dtype != DTYPE:
                weight = rounded(weight, DTYPE).to(tl.float32)
            products += (tl.sum(weight * values[0], axis=2),)
    elif F.encoding == "mxfp4" or F.encoding == "nvfp4":
        for j in tl.static_range(PLANES):
            products += (_e2m1_sum(unit[0], values, j) * scales[j][0],)
    elif F.encoding == "fp8" or F.encoding == "mxfp8":
        for j in tl.static_range(PLANES):
            products += (_e4m3_sum(unit[j], values) * scales[j][0],)
    else:
        values_sum = tl.sum(values[0] + values[1] + values[2] + values[3], axis=2)  # [1, SPANS]
        if F.bits == 8:
            sums = ()
            for j in tl.static_range(PLANES):
                sums += _plane_sums(unit[j], values, values_sum, one, 8)
        elif F.bits == 3:
            low = _plane_sums(unit[0], values, values_sum, one, 2)
            next_low = _plane_sums(unit[1], values, values_sum, one, 2)
            high = _plane_sums(unit[2], values, values_sum, one, 1)
            sums = ()
            for j in tl.static_range(4):
                sums += (low[j] + 4.0 * high[2 * j], next_low[j] + 4.0 * high[2 * j + 1])
        else:
            sums = _plane_sums(unit[0], values, values_sum, one, F.bits)
        for j in tl.static_range(PLANES):
            products += ((sums[j] - scales[j][1] * values_sum) * scales[j][0],)
    return products


@triton.jit
def _plane_sums(words, values, values_sum, one, BITS: tl.constexpr):
    """sum(value * q) over the last axis for each of the ``8 / BITS`` planes of bytes."""
    num_planes: tl.constexpr = 8 // BITS
    totals = ()
    for j in tl.static_range(num_planes):
        # 1 + (what the byte has from plane j down) / 2 ** (8 - j * BITS)
        total = tl.zeros_like(words).to(tl.float32)
        for byte in tl.static_range(4):
            bits = _shifted(words, 15 + j * BITS - 8 * byte)
            bits = (bits & (((1 << (8 - j * BITS)) - 1) << (15 + j * BITS))) | one
            total += bits.to(tl.float32, bitcast=True) * values[byte]
        totals += (tl.sum(total, axis=2) - values_sum,)
    sums = ()
    for j in tl.static_range(num_planes - 1):
        sums += (totals[j] * (1 << BITS) - totals[j + 1],)
    sums += (totals[num_planes - 1] * (1 << BITS),)
    return sums


@triton.jit
def _e2m1_sum(words, values, j: tl.constexpr):
    """sum(value * weight) over the last axis for the 4-bit floats of plane ``j``, unscaled."""
    total = tl.zeros_like(words).to(tl.float32)
    for byte in tl.static_range(4):
        # Two bits of exponent and one of mantissa below a float32's own, the sign in its place:
        # right but for the exponent's bias, 127 instead of 1, subnormal 0.5 included.
        bits = _shifted(words, 18 + 4 * j - 8 * byte) & 0x01C00000
        bits |= _shifted(words, 24 + 4 * j - 8 * byte) & -0x80000000
        total += bits.to(tl.float32, bitcast=True) * 2.0**126 * values[byte]
    return tl.sum(total, axis=2)


@triton.jit
def _e4m3_sum(words, values):
    """sum(value * weight) over the last axis for 8-bit floats, unscaled."""
    total = tl.zeros_like(words).to(tl.float32)
    for byte in tl.static_range(4):
        # As _e2m1_sum, with four bits of exponent, of which the bias is 7.
        size = _shifted(words, 20 - 8 * byte) & 0x07F00000
        bits = size | (_shifted(words, 24 - 8 * byte) & -0x80000000)
        weight = bits.to(tl.float32, bitcast=True) * 2.0**120
        weight = tl.where(size == 0x07F00000, float("nan"), weight)
        total += weight * values[byte]
    return tl.sum(total, axis=2)


@triton.jit
def _shifted(words, left: tl.constexpr):
    return words << left if left >= 0 else words >> -left


@triton.jit
def _experts_gemv_kernel(
    x,  # [T, H] if INNER, else [T * k, I]
    top_k_index,  # [T, k]
    top_k_weights,  # [T, k]; of no use if INNER
    slot_of,  # [NUM_EXPERTS]
    cache,  # [num_slots, SLOT_BYTES]
    out,  # [T * k, I] if INNER, else [T, k, H]
    one,  # ONE_BITS
    F: tl.constexpr,
    INNER: tl.constexpr,  # I, or 0 for down
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    pair = tl.program_id(1)
    expert = tl.load(top_k_index + pair)
    # Index NUM_EXPERTS means "none" where tokens are spread over devices.
    known = (expert >= 0) & (expert < NUM_EXPERTS)
    slot = tl.load(slot_of + expert, mask=known, other=-1)
    if slot >= 0:
        parts = record_parts(cache + slot.to(tl.int64) * SLOT_BYTES, F)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = rows < F.rows // PLANES
        if INNER:
            x += pair // TOP_K * F.columns
        else:
            x += pair * F.columns
        products = gemv(x, parts, rows, one, F, PLANES, ROWS, SPANS)
        results = ()
        for j in tl.static_range(PLANES):
            row = rows + j * (F.rows // PLANES)
            result = rounded(products[j], DTYPE).to(tl.float32)
            if F.has_bias:
                bias = rounded(tl.load(parts[7] + row, mask=mask, other=0).to(tl.float32), DTYPE)
                result = rounded(result + bias.to(tl.float32), DTYPE).to(tl.float32)
            results += (result,)
        if INNER:
            out += pair * INNER
            # Gate and up, or up alone.
            num: tl.constexpr = PLANES * INNER // F.rows
            for j in tl.static_range(num):
                inner = activate(results[j], results[j + PLANES - num], KIND, ALPHA, LIMIT, DTYPE)
                tl.store(out + rows + j * (F.rows // PLANES), rounded(inner, DTYPE), mask=mask)
        else:
            out += pair.to(tl.int64) * F.rows
            weight = tl.load(top_k_weights + pair).to(tl.float32)
            for j in tl.static_range(PLANES):
                result = rounded(results[j] * weight, out.dtype.element_ty)
                tl.store(out + rows + j * (F.rows // PLANES), result, mask=mask)


def aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and at an address from which four values can be read at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def launch_experts_gemv(
    out: Tensor,  # [T * k, I], or [T, k, H] without an activation
    x: Tensor,  # [T, H], or [T * k, I]; aligned
    top_k_index: Tensor,  # [T, k], integer
    top_k_weights: Tensor,  # [T, k], floating
    slot_of: Tensor,  # [num_experts], int32
    cache: Tensor,  # [num_slots, slot_bytes], uint8
    form: Form,
    activation: Activation | None,
    blocks: GemvBlocks | None = None,
) -> None:
    """One matrix of each pair's expert: the first with its activation, or down weighted."""
    blocks = blocks or gemv_blocks(form)
    inner = out.shape[-1] if activation else 0
    planes = max(form.rows_per_unit, form.rows // inner if inner else 1)
    grid = (triton.cdiv(form.rows // planes, blocks.rows), top_k_index.numel())
    _experts_gemv_kernel[grid](
        x,
        top_k_index,
        top_k_weights,
        slot_of,
        cache,
        out,
        ONE_BITS,
        F=form,
        INNER=inner,
        TOP_K=top_k_index.shape[1],
        NUM_EXPERTS=slot_of.numel(),
        SLOT_BYTES=cache.shape[1],
        **activation_constants(activation),
        DTYPE=TRITON_DTYPES[x.dtype],
        PLANES=planes,
        ROWS=blocks.rows,
        SPANS=blocks.spans,
        num_warps=blocks.num_warps,
    )

"""Experts from device-cache slots for a few tokens: one matrix-vector product per pair.

A *pair* is a token and a position of its top k. Each block takes a pair and a few units of the
expert's matrix; it finds the expert in the routing and its slot in ``slot_of``, both on the
device, and leaves at once if there is none. So the grid does not depend on the routing and a
CUDA graph can hold the launch.

Per group of weights sum(x * (q - zero)) * scale is taken apart, since the bandwidth of a large
GPU leaves three or four instructions for a 4-bit weight. A shift puts the bits of q below the
exponent of 1.0, one OR makes that a float, a multiply-add sums it; what is then wrong (the 1,
the lower bits of the same byte, which are another row's, and the zero) is made good once per
group. All sums are float32, in an order that only the block sizes decide.
"""

import triton
from torch import Tensor
from triton import language as tl

from expertd_inference.activation import Activation
from expertd_inference.kernels.triton_activation import activate, activation_constants
from expertd_inference.kernels.triton_blocks import GemvBlocks, gemv_blocks
from expertd_inference.kernels.triton_dequant import (
    e2m1,
    load_scales,
    load_unit,
    plane,
    record_parts,
    rounded,
    span_columns,
)
from expertd_inference.kernels.triton_form import TRITON_DTYPES, Form


@triton.jit
def gemv(
    x,  # pointer to F.columns values
    parts,  # pointers, as record_parts has them
    rows,  # [ROWS] units
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
        columns, column_mask = span_columns(first, F, SPANS)
        values = tl.load(x + columns, mask=column_mask, other=0).to(tl.float32)
        products = _products(unit, values[None, :, :], scales, F, PLANES)
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
    columns, column_mask = span_columns(first, F, SPANS)
    mask = row_mask[:, None, None] & column_mask[None, :, :]
    return load_unit(q, rows[:, None, None], columns[None, :, :], mask, F, PLANES)


@triton.jit
def _products(unit, values, scales, F: tl.constexpr, PLANES: tl.constexpr):
    """``values`` [1, SPANS, span] times the weights, per row and span: PLANES of [R, SPANS]."""
    products = ()
    if F.encoding == "plain":
        for j in tl.static_range(PLANES):
            products += (tl.sum(unit[j].to(tl.float32) * values, axis=2),)
    elif F.encoding == "mxfp4":
        for j in tl.static_range(PLANES):
            sums = tl.sum(e2m1(plane(unit, j, F)) * values, axis=2)
            products += (sums * scales[j][0] * 16384.0,)
    else:
        values_sum = tl.sum(values, axis=2)  # [1, SPANS]
        if F.bits == 8:
            sums = ()
            for j in tl.static_range(PLANES):
                sums += _plane_sums(unit[j], values, values_sum, 8)
        elif F.bits == 3:
            even = _plane_sums(unit[0], values, values_sum, 2)
            odd = _plane_sums(unit[1], values, values_sum, 2)
            high = _plane_sums(unit[2], values, values_sum, 1)
            sums = ()
            for j in tl.static_range(4):
                sums += (even[j] + 4.0 * high[2 * j], odd[j] + 4.0 * high[2 * j + 1])
        else:
            sums = _plane_sums(unit[0], values, values_sum, F.bits)
        for j in tl.static_range(PLANES):
            products += ((sums[j] - scales[j][1] * values_sum) * scales[j][0],)
    return products


@triton.jit
def _plane_sums(packed, values, values_sum, BITS: tl.constexpr):
    """sum(value * q) over the last axis for each of the ``8 / BITS`` planes of bytes."""
    num_planes: tl.constexpr = 8 // BITS
    totals = ()
    for j in tl.static_range(num_planes):
        # 1 + (what the byte has from plane j down) / 2 ** (8 - j * BITS); the planes above
        # fall among the exponent's bits, which are ones.
        bits = (packed.to(tl.int32) << (15 + j * BITS)) | 0x3F800000
        totals += (tl.sum(bits.to(tl.float32, bitcast=True) * values, axis=2) - values_sum,)
    sums = ()
    for j in tl.static_range(num_planes - 1):
        sums += (totals[j] * (1 << BITS) - totals[j + 1],)
    sums += (totals[num_planes - 1] * (1 << BITS),)
    return sums


@triton.jit
def _experts_gemv_kernel(
    x,  # [T, H] if GATED, else [T * k, I]
    top_k_index,  # [T, k]
    top_k_weights,  # [T, k]; of no use if GATED
    slot_of,  # [NUM_EXPERTS]
    cache,  # [num_slots, SLOT_BYTES]
    out,  # [T * k, I] if GATED, else [T, k, H]
    F: tl.constexpr,
    GATED: tl.constexpr,
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
        if GATED:
            x += pair // TOP_K * F.columns
        else:
            x += pair * F.columns
        products = gemv(x, parts, rows, F, PLANES, ROWS, SPANS)
        results = ()
        for j in tl.static_range(PLANES):
            row = rows + j * (F.rows // PLANES)
            result = rounded(products[j], DTYPE).to(tl.float32)
            if F.has_bias:
                bias = rounded(tl.load(parts[7] + row, mask=mask, other=0).to(tl.float32), DTYPE)
                result = rounded(result + bias.to(tl.float32), DTYPE).to(tl.float32)
            results += (result,)
        if GATED:
            out += pair * (F.rows // 2)
            for j in tl.static_range(PLANES // 2):
                inner = activate(results[j], results[j + PLANES // 2], KIND, ALPHA, LIMIT, DTYPE)
                tl.store(out + rows + j * (F.rows // PLANES), rounded(inner, DTYPE), mask=mask)
        else:
            out += pair.to(tl.int64) * F.rows
            weight = tl.load(top_k_weights + pair).to(tl.float32)
            for j in tl.static_range(PLANES):
                result = rounded(results[j] * weight, out.dtype.element_ty)
                tl.store(out + rows + j * (F.rows // PLANES), result, mask=mask)


def launch_experts_gemv(
    out: Tensor,  # [T * k, I], or [T, k, H] without an activation
    x: Tensor,  # [T, H], or [T * k, I]; contiguous
    top_k_index: Tensor,  # [T, k], integer
    top_k_weights: Tensor,  # [T, k], floating
    slot_of: Tensor,  # [num_experts], int32
    cache: Tensor,  # [num_slots, slot_bytes], uint8
    form: Form,
    activation: Activation | None,
    blocks: GemvBlocks | None = None,
) -> None:
    """One matrix of each pair's expert: gate and up with their activation, or down weighted."""
    blocks = blocks or gemv_blocks(form)
    planes = max(form.rows_per_unit, 2 if activation else 1)
    grid = (triton.cdiv(form.rows // planes, blocks.rows), top_k_index.numel())
    _experts_gemv_kernel[grid](
        x,
        top_k_index,
        top_k_weights,
        slot_of,
        cache,
        out,
        F=form,
        GATED=activation is not None,
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

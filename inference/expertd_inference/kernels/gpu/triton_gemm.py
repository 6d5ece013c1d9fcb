"""Experts from device-cache slots for many tokens: tiles of pairs that share an expert.

Pairs (a token and a position of its top k) are ordered by expert on the device
(:mod:`.triton_route`); a tile has up to ``blocks.tokens`` pairs of one expert. Weights are
dequantized in registers to the activations' dtype and multiplied on the tensor cores with float32
sums; a quantized weight takes two products there, of its value rounded and of what the rounding
left, and so is as exact as in a GEMV. How pairs are tiled does not change a pair's sum.
"""

import triton
from torch import Tensor
from triton import language as tl

from expertd_inference.kernels.activation import Activation
from expertd_inference.kernels.gpu.triton_activation import activate, activation_constants
from expertd_inference.kernels.gpu.triton_blocks import GemmBlocks
from expertd_inference.kernels.gpu.triton_dequant import (
    INTERPRETED,
    e2m1,
    e4m3,
    load_scales,
    load_unit,
    plane,
    record_parts,
    rounded,
    span_columns,
)
from expertd_inference.kernels.gpu.triton_form import TRITON_DTYPES, Form
from expertd_inference.kernels.gpu.triton_route import Tiles


@triton.jit
def gemm(
    x,  # [M, 1] pointers to the first of F.columns values
    x_mask,  # [M, 1]
    parts,
    rows,  # [ROWS] units
    F: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,  # M
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products of the rows of ``x`` and of the units: PLANES of [M, ROWS], float32."""
    num_spans: tl.constexpr = (F.columns + F.span - 1) // F.span
    width: tl.constexpr = SPANS * F.span
    row_mask = rows < F.rows // PLANES
    sums = ()
    for _ in tl.static_range(PLANES):
        sums += (tl.zeros((TOKENS, ROWS), tl.float32),)
    for first in tl.range(0, num_spans, SPANS, num_stages=STAGES):
        flat = first * F.span + tl.arange(0, width)
        values = tl.load(x + flat[None, :], mask=x_mask & (flat < F.columns)[None, :], other=0)
        columns, column_mask = span_columns(first, F, SPANS)
        unit = load_unit(
            parts[0],
            rows[:, None, None],
            columns[None, :, :],
            row_mask[:, None, None] & column_mask[None, :, :],
            F,
            PLANES,
            False,
        )
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
        added = ()
        for j in tl.static_range(PLANES):
            if F.encoding == "plain":
                weight = unit[j]
                if F.dtype != DTYPE:
                    weight = rounded(weight.to(tl.float32), DTYPE)
            else:
                q = plane(unit, j, F)
                if F.encoding == "mxfp4" or F.encoding == "nvfp4":
                    exact = e2m1(q) * 16384.0
                elif F.encoding == "fp8" or F.encoding == "mxfp8":
                    exact = e4m3(q)
                else:
                    exact = q.to(tl.float32) - scales[j][1][:, :, None]
                exact *= scales[j][0][:, :, None]
                if F.encoding == "mxfp4" or F.encoding == "mxfp8":
                    # A power of two times three or four bits is not rounded.
                    weight = rounded(exact, DTYPE)
                elif tl.bfloat16 == DTYPE:
                    # Cut off: one instruction, and what is left is exact in the rest.
                    near = (exact.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
                    weight = near.to(DTYPE)
                else:
                    weight = exact.to(DTYPE)
                    near = weight.to(tl.float32)
            total = _dot(values, tl.reshape(weight, (ROWS, width)), sums[j])
            if F.has_rest and tl.float32 != DTYPE:
                # What was rounded away, which a GEMV multiplies with too.
                rest = rounded(exact - near, DTYPE)
                total = _dot(values, tl.reshape(rest, (ROWS, width)), total)
            added += (total,)
        sums = added
    return sums


@triton.jit
def _dot(values, weight, sums):
    """``sums`` and ``values`` [M, K] times ``weight`` [N, K]: [M, N], float32."""
    if INTERPRETED:
        total = tl.dot(values.to(tl.float32), tl.trans(weight.to(tl.float32)), sums)
    else:
        # "ieee" is about float32, which would be cut to TF32.
        total = tl.dot(values, tl.trans(weight), sums, input_precision="ieee")
    return total


@triton.jit
def _experts_gemm_kernel(
    x,  # [T, H] if INNER, else [T * k, I]
    pairs,  # [T * k], by expert
    tile_slot,  # [tiles]
    tile_first,  # [tiles], into pairs
    tile_end,  # [tiles]
    top_k_weights,  # [T, k]; of no use if INNER
    cache,  # [num_slots, SLOT_BYTES]
    out,  # [T * k, I] if INNER, else [T, k, H]
    F: tl.constexpr,
    INNER: tl.constexpr,  # I, or 0 for down
    TOP_K: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(1)
    slot = tl.load(tile_slot + tile)
    if slot >= 0:
        parts = record_parts(cache + slot.to(tl.int64) * SLOT_BYTES, F)
        at = tl.load(tile_first + tile) + tl.arange(0, TOKENS)
        pair_mask = (at < tl.load(tile_end + tile))[:, None]
        pair = tl.load(pairs + at, mask=at < tl.load(tile_end + tile), other=0).to(tl.int64)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = pair_mask & (rows < F.rows // PLANES)[None, :]
        if INNER:
            source = x + (pair // TOP_K * F.columns)[:, None]
        else:
            source = x + (pair * F.columns)[:, None]
        products = gemm(
            source, pair_mask, parts, rows, F, PLANES, TOKENS, ROWS, SPANS, DTYPE, STAGES
        )
        results = ()
        for j in tl.static_range(PLANES):
            result = rounded(products[j], DTYPE).to(tl.float32)
            if F.has_bias:
                row = rows + j * (F.rows // PLANES)
                bias = tl.load(parts[7] + row, mask=rows < F.rows // PLANES, other=0)
                bias = rounded(bias.to(tl.float32), DTYPE).to(tl.float32)
                result = rounded(result + bias[None, :], DTYPE).to(tl.float32)
            results += (result,)
        if INNER:
            target = out + (pair * INNER)[:, None] + rows[None, :]
            # Gate and up, or up alone.
            num: tl.constexpr = PLANES * INNER // F.rows
            for j in tl.static_range(num):
                inner = activate(results[j], results[j + PLANES - num], KIND, ALPHA, LIMIT, DTYPE)
                tl.store(target + j * (F.rows // PLANES), rounded(inner, DTYPE), mask=mask)
        else:
            target = out + (pair * F.rows)[:, None] + rows[None, :]
            weight = tl.load(top_k_weights + pair, mask=at < tl.load(tile_end + tile), other=0)
            weight = weight.to(tl.float32)[:, None]
            for j in tl.static_range(PLANES):
                result = rounded(results[j] * weight, out.dtype.element_ty)
                tl.store(target + j * (F.rows // PLANES), result, mask=mask)


def launch_experts_gemm(
    out: Tensor,  # [T * k, I], or [T, k, H] without an activation
    x: Tensor,  # [T, H], or [T * k, I]; contiguous
    tiles: Tiles,
    top_k_weights: Tensor,  # [T, k], floating
    cache: Tensor,  # [num_slots, slot_bytes], uint8
    form: Form,
    activation: Activation | None,
    blocks: GemmBlocks,
) -> None:
    """One matrix of each tile's expert: the first with its activation, or down weighted."""
    inner = out.shape[-1] if activation else 0
    planes = max(form.rows_per_unit, form.rows // inner if inner else 1)
    grid = (triton.cdiv(form.rows // planes, blocks.rows), tiles.slot.numel())
    _experts_gemm_kernel[grid](
        x,
        tiles.pairs,
        tiles.slot,
        tiles.first,
        tiles.end,
        top_k_weights,
        cache,
        out,
        F=form,
        INNER=inner,
        TOP_K=top_k_weights.shape[1],
        SLOT_BYTES=cache.shape[1],
        **activation_constants(activation),
        DTYPE=TRITON_DTYPES[x.dtype],
        PLANES=planes,
        TOKENS=blocks.tokens,
        ROWS=blocks.rows,
        SPANS=max(1, blocks.columns // form.span),
        STAGES=blocks.num_stages,
        num_warps=blocks.num_warps,
    )

"""A quantized linear layer of the trunk on a GPU, by the experts' own loops."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from expertd_inference.kernels.gpu.triton_blocks import (
    MAX_LINEAR_GEMV_TOKENS,
    gemm_blocks,
    gemv_blocks,
)
from expertd_inference.kernels.gpu.triton_dequant import rounded
from expertd_inference.kernels.gpu.triton_form import (
    PART_SUFFIXES,
    TRITON_DTYPES,
    Form,
    find_part,
    weight_form,
)
from expertd_inference.kernels.gpu.triton_gemm import gemm
from expertd_inference.kernels.gpu.triton_gemv import ONE_BITS, aligned, gemv
from expertd_inference.kernels.weights import QuantizedWeight


@triton.jit
def _linear_gemv_kernel(
    x,  # [T, columns]
    out,  # [T, rows]
    weight,
    scale,
    zero,
    scale_scale,
    scale_zero,
    zero_scale,
    zero_zero,
    one,  # ONE_BITS
    F: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    parts = (weight, scale, zero, scale_scale, scale_zero, zero_scale, zero_zero)
    products = gemv(x + token * F.columns, parts, rows, one, F, PLANES, ROWS, SPANS)
    out += token * F.rows
    for j in tl.static_range(PLANES):
        row = rows + j * (F.rows // PLANES)
        tl.store(out + row, rounded(products[j], DTYPE), mask=rows < F.rows // PLANES)


@triton.jit
def _linear_gemm_kernel(
    x,  # [T, columns]
    out,  # [T, rows]
    weight,
    scale,
    zero,
    scale_scale,
    scale_zero,
    zero_scale,
    zero_zero,
    num_tokens,  # T
    F: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Neighbours share a tile of the weights, which is then read once from HBM.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    parts = (weight, scale, zero, scale_scale, scale_zero, zero_scale, zero_zero)
    there = (token < num_tokens)[:, None]
    token = token.to(tl.int64)[:, None]
    products = gemm(
        x + token * F.columns, there, parts, rows, F, PLANES, TOKENS, ROWS, SPANS, DTYPE, STAGES
    )
    for j in tl.static_range(PLANES):
        at = token * F.rows + (rows + j * (F.rows // PLANES))[None, :]
        mask = there & (rows < F.rows // PLANES)[None, :]
        tl.store(out + at, rounded(products[j], DTYPE), mask=mask)


def _launch(out: Tensor, x: Tensor, pointers: list[Tensor], form: Form) -> None:
    num_tokens = x.shape[0]
    planes = form.rows_per_unit
    dtype = TRITON_DTYPES[x.dtype]
    if num_tokens <= MAX_LINEAR_GEMV_TOKENS:
        few = gemv_blocks(form)
        _linear_gemv_kernel[(triton.cdiv(form.rows // planes, few.rows), num_tokens)](
            x,
            out,
            *pointers,
            ONE_BITS,
            F=form,
            DTYPE=dtype,
            PLANES=planes,
            ROWS=few.rows,
            SPANS=few.spans,
            num_warps=few.num_warps,
        )
        return
    many = gemm_blocks(form, num_tokens)
    grid = (triton.cdiv(num_tokens, many.tokens), triton.cdiv(form.rows // planes, many.rows))
    _linear_gemm_kernel[grid](
        x,
        out,
        *pointers,
        num_tokens,
        F=form,
        DTYPE=dtype,
        PLANES=planes,
        TOKENS=many.tokens,
        ROWS=many.rows,
        SPANS=max(1, many.columns // form.span),
        STAGES=many.num_stages,
        num_warps=many.num_warps,
    )


def linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in]: [..., out] in the dtype of ``x``.

    Accumulated in float32 and rounded once. Nothing waits for the device; a fixed number of
    tokens can be captured in a CUDA graph. Raises ValueError if shapes or dtypes do not fit.
    """
    matrix = weight.matrix
    if x.shape[-1] != matrix.in_features or x.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"{matrix.name} takes {matrix.in_features} floating values, not {x.shape[-1]} of "
            f"{x.dtype}"
        )
    form = weight_form(matrix, weight.parts)
    pointers = []
    for suffix in PART_SUFFIXES[:-1]:
        part = find_part(weight.parts, matrix.name, suffix)
        if part is not None and (part.device != x.device or not part.is_contiguous()):
            raise ValueError(f"{matrix.name}.{suffix} is on {part.device}, or strided")
        # What the kernel is not compiled to read it may be given anything for.
        pointers.append(x if part is None else part)
    flat = aligned(x.reshape(-1, matrix.in_features))
    out = flat.new_empty(flat.shape[0], matrix.out_features)
    if flat.shape[0]:
        # Triton launches on the current device, which is another thread's or worker's choice.
        with torch.cuda.device_of(flat):
            _launch(out, flat, pointers, form)
    return out.view(*x.shape[:-1], matrix.out_features)

"""The sum of a layer's slots on a GPU, always in the order of the top k."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from expertd_inference.kernels.triton_dequant import rounded
from expertd_inference.kernels.triton_form import TRITON_DTYPES

_COLUMNS = 512
"""Per program: a token of hidden size 2048 takes four, each a few hundred nanoseconds long."""


@triton.jit
def _sum_slots_kernel(
    slots,  # [T, TOP_K, WIDTH]
    out,  # [T, WIDTH]
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for position in tl.static_range(TOP_K):
        at = (token * TOP_K + position) * WIDTH + columns
        total += tl.load(slots + at, mask=mask, other=0).to(tl.float32)
    # As torch has it: rounded to the slots' dtype first.
    total = rounded(total, slots.dtype.element_ty).to(tl.float32)
    tl.store(out + token * WIDTH + columns, rounded(total, DTYPE), mask=mask)


def sum_slots(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer's output [T, H] in ``dtype`` from its filled slots [T, k, H].

    Added in float32 in the order of the top k. Raises ValueError for strided slots or for a
    dtype that is not floating.
    """
    if not slots.is_contiguous():
        raise ValueError("slots are strided")
    if slots.dtype not in TRITON_DTYPES or dtype not in TRITON_DTYPES:
        raise ValueError(f"there is no GPU kernel for {slots.dtype} and {dtype}")
    num_tokens, top_k, width = slots.shape
    out = slots.new_empty(num_tokens, width, dtype=dtype)
    if num_tokens:
        _sum_slots_kernel[(triton.cdiv(width, _COLUMNS), num_tokens)](
            slots,
            out,
            TOP_K=top_k,
            WIDTH=width,
            DTYPE=TRITON_DTYPES[dtype],
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return out

"""How kernels divide their work: the one table to tune.

Sums are taken in an order that follows from these sizes. So they are a function of a matrix's
form and of the number of tokens alone, and nothing chooses among them while a model runs: equal
inputs give equal bits, whatever is cached. ``python -m bench.gpu_kernels --tune`` tries others.

The reasoning behind the figures, which no GPU has confirmed yet (H200: 132 SMs, 4.8 TB/s; some
30 KB must be under way per SM to hide a latency of 0.8 us):

- A thread of a GEMV reads 16 columns of a row at once, and 32 such spans keep a warp on 512
  contiguous bytes: every sector is read once. A step has 16 units (8 KB at 4 bit, in four loads
  for each of 128 threads), the next step's are under way meanwhile, and three blocks fit on an SM.
- Few rows per block, so that one token's experts fill the GPU: gate-and-up of 30B-A3B at 4 bit
  is 768 units of 2 KB, times eight experts: 384 blocks, all of which run at once.
- More rows per thread share its conversion of x, until registers run out: hence fewer units where
  a unit is several byte rows.
- GEMM tiles multiply at least 16 tokens (the tensor core's height) by 64 or more rows.
"""

import math
from dataclasses import dataclass

from expertd_inference.kernels.gpu.triton_form import Form

MAX_GEMV_TOKENS = 8
"""Up to so many tokens each (token, expert) pair reads its expert by itself."""
MAX_GEMV_PAIRS = 65_535
"""CUDA's limit of a grid's second dimension, which pairs are."""
MAX_LINEAR_GEMV_TOKENS = 2
"""The trunk's rows are shared by all tokens: from three on a tensor core reads them once."""


@dataclass(frozen=True)
class GemvBlocks:
    """``rows`` units by ``spans`` spans of 16 bytes a step, per block of ``num_warps`` warps."""

    rows: int
    spans: int
    num_warps: int


@dataclass(frozen=True)
class GemmBlocks:
    """A tile of ``tokens`` by ``rows`` units, ``columns`` at a step."""

    tokens: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


GEMV_ROWS: dict[str | int, int] = {"plain": 16, 8: 8, 4: 16, 3: 2, 2: 8}
"""Units at a step, by encoding or bits; a 3-bit unit is three byte rows and sums eight: with two of
them a thread takes 96 registers and five blocks fit on an SM, with four all 255 and two fit."""
GEMV_SPANS = 32
GEMV_WARPS = 4

GEMM_TOKENS = (16, 32, 64, 128)
GEMM_UNITS: dict[str | int, int] = {"plain": 64, 8: 64, 4: 32, 3: 16, 2: 16}
"""Units of a tile, by encoding or bits."""
GEMM_COLUMNS: dict[str | int, int] = {"plain": 64, 8: 32, 4: 32, 3: 16, 2: 32}
"""A step holds as many tiles of weights as a unit has rows, each twice: with more columns registers
are spilled."""
GEMM_WARPS = {16: 4, 32: 4, 64: 8, 128: 8}
"""By tokens: from 64 on the sums of four warps do not fit in registers."""
GEMM_STAGES = 3


def gemv_blocks(form: Form) -> GemvBlocks:
    """The blocks of a GEMV over a matrix of this form."""
    num_spans = math.ceil(form.columns / form.span)
    # A divisor of the row keeps the last step as full as the others, if it is not too small.
    spans = math.gcd(num_spans, GEMV_SPANS)
    if spans < GEMV_SPANS // 4:
        spans = min(GEMV_SPANS, _power_of_two_above(num_spans))
    return GemvBlocks(GEMV_ROWS[_key(form)], spans, GEMV_WARPS)


def gemm_blocks(form: Form, tokens: int) -> GemmBlocks:
    """The tiles of a GEMM in which a matrix (an expert, on average) sees ``tokens`` tokens."""
    height = next((size for size in GEMM_TOKENS if size >= tokens), GEMM_TOKENS[-1])
    return GemmBlocks(
        tokens=height,
        rows=GEMM_UNITS[_key(form)],
        columns=GEMM_COLUMNS[_key(form)],
        num_warps=GEMM_WARPS[height],
        num_stages=GEMM_STAGES,
    )


def _key(form: Form) -> str | int:
    return "plain" if form.encoding == "plain" else form.bits


def _power_of_two_above(value: int) -> int:
    return 1 << (value - 1).bit_length()

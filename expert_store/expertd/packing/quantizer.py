"""HQQ's decision on q, scale and zero, for one matrix.

Half-Quadratic Quantization (Badri & Shaji, 2023), as its authors' package ``hqq`` does it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from expertd.pack.layout import Matrix
from expertd.packing.codec import encode

SOLVER_ELEMENTS = 1 << 16
"""Weights that the solver gets at a time: its dozen temporaries then stay in a core's cache,
and its stopping criterion is that of a few rows."""


def quantize(weight: Tensor, matrix: Matrix, *, optimize: bool) -> dict[str, Tensor]:
    """The parts of ``matrix`` for ``weight`` [out, in] (floating), by their full names.

    ``optimize`` runs HQQ's solver; without it the groups' extremes decide, 10 to 20 times faster
    and less exact. Equal input gives equal bytes, on any number of cores. Raises
    ValueError if a weight is not finite or its group lies outside the range of fp16.
    """
    # Rows in whole groups; HQQ's own grouping of axis 1 is then ours.
    num_rows = max(1, SOLVER_ELEMENTS // matrix.in_features)
    results = _solvers().map(
        lambda rows: _solve(rows, matrix.bits, matrix.group_size, optimize=optimize),
        torch.split(weight.to(torch.float32), num_rows),
    )
    q, scale, zero = (torch.cat(pieces) for pieces in zip(*results, strict=True))
    parts = {f"{matrix.name}.q": encode(q, matrix.bits)}
    groups = (matrix.out_features, matrix.in_features // matrix.group_size)
    for name, values in ((f"{matrix.name}.scale", scale), (f"{matrix.name}.zero", zero)):
        if matrix.meta_group_size:
            parts |= _quantize_meta(name, values.view(groups), matrix.meta_group_size)
        else:
            parts[name] = _to_half(name, values.view(groups))
    return parts


@cache
def _solvers() -> ThreadPoolExecutor:
    """A thread per core, each computing alone.

    The solver is hundreds of small operations. Sharing each among all cores would mean a
    barrier after every one, where the others spin while one is not scheduled: on two busy
    cores that takes 5 to 30 times as long. And a sum then depends on the number of threads.
    """
    return ThreadPoolExecutor(
        len(os.sched_getaffinity(0)), "expertd-quantizer", lambda: torch.set_num_threads(1)
    )


def _solve(
    weight: Tensor, bits: int, group_size: int, *, optimize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized [rows, in] (uint8), scale and zero [rows * in / group_size] (float32)."""
    q, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=group_size,
        optimize=optimize,
        axis=1,
        bitpack=False,
        device="cpu",
    )
    return q.view(weight.shape).to(torch.uint8), meta["scale"].view(-1), meta["zero"].view(-1)


def _quantize_meta(name: str, values: Tensor, group_size: int) -> dict[str, Tensor]:
    """8-bit parts of a scale or zero [out, groups], in groups over its flattened values."""
    # HQQ takes a group that spans less than 1e-4 for constant. That is made for weights;
    # scales are smaller, so they are brought near 1 first. A power of two costs no bits.
    unit = torch.exp2(values.abs().max().clamp(min=1e-30).log2().ceil())
    q, scale, zero = _solve((values / unit).view(1, -1), 8, group_size, optimize=False)
    return {
        f"{name}.q": q.view(values.shape),
        f"{name}.scale": _to_half(name, scale * unit),
        f"{name}.zero": _to_half(name, zero),
    }


def _to_half(name: str, values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} is not finite in fp16: the weights are damaged or too large")
    return half

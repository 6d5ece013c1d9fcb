"""The parts of a quantized matrix: a solver's decision in the bytes of a pack."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from expertd.packing.solver import Solver, choose_solver
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.layout import Matrix, matrix_parts


def quantize(
    weight: Tensor, matrix: Matrix, *, optimize: bool, solver: Solver | None = None
) -> dict[str, Tensor]:
    """The parts of ``matrix`` for ``weight`` [out, in] (floating), by their full names.

    Raises ValueError if a weight is not finite.
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    parts = {
        name: torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        for name, shape, dtype in matrix_parts(matrix, "", scale_type(largest, matrix.bits))
    }
    bad = quantize_to(
        parts, weight, matrix, optimize=optimize, solver=solver or choose_solver().solver
    )
    if bad:
        raise ValueError(f"{bad} is not finite in fp16: the weights are damaged or too large")
    return parts


def scale_type(largest: float, bits: int) -> str:
    """In which type the scales of weights up to ``largest`` are stored, in safetensors' names.

    F16 has more digits, and kernels that are written for it. It ends at 65504, and far below
    its least normal number, 2 ** -14, has too few digits for a scale.
    """
    step = 2 * largest / ((1 << bits) - 1 or 1)
    return "BF16" if 0 < step < 2**-18 or 2**14 < step < math.inf else "F16"


def quantize_to(
    parts: Mapping[str, Tensor], weight: Tensor, matrix: Matrix, *, optimize: bool, solver: Solver
) -> str:
    """As :func:`quantize`, but writes ``parts``, which may be those of a record.

    With ``optimize`` the solver looks for the best zeros; without it the groups' extremes
    decide, faster and less exact. Returns the name of a part that is not finite, or nothing.
    """
    bad = ""
    own = torch.float32 if matrix.meta_group_size else parts[f"{matrix.name}.scale"].dtype
    results = solver.solve(weight, matrix, parts[f"{matrix.name}.q"], optimize=optimize, scales=own)
    for name, values in zip((f"{matrix.name}.scale", f"{matrix.name}.zero"), results, strict=True):
        if not matrix.meta_group_size:
            halves = parts[name]
            halves.copy_(values)
            bad = bad or _not_finite(name, values, halves)
            continue
        scales = parts[f"{name}.scale"].dtype
        q, scale, zero = solver.quantize_meta(values.view(-1), matrix.meta_group_size, scales)
        bad = bad or _not_finite(name, values, scale, zero)
        parts[f"{name}.q"].copy_(q.view(values.shape))
        parts[f"{name}.scale"].copy_(scale)
        parts[f"{name}.zero"].copy_(zero)
    return bad


def _not_finite(name: str, *values: Tensor) -> str:
    return "" if all(bool(torch.isfinite(part).all()) for part in values) else name

"""The parts of a quantized matrix: a solver's decision in the bytes of a pack."""

from collections.abc import Mapping

import torch
from torch import Tensor

from expertd.pack.layout import Matrix, matrix_parts
from expertd.packing.codec import TORCH_DTYPES
from expertd.packing.solver import Solver, choose_solver


def quantize(
    weight: Tensor, matrix: Matrix, *, optimize: bool, solver: Solver | None = None
) -> dict[str, Tensor]:
    """The parts of ``matrix`` for ``weight`` [out, in] (floating), by their full names.

    Raises ValueError if a weight is not finite or its group lies outside the range of fp16.
    """
    parts = {
        name: torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        for name, shape, dtype in matrix_parts(matrix, "")
    }
    quantize_to(parts, weight, matrix, optimize=optimize, solver=solver or choose_solver().solver)
    return parts


def quantize_to(
    parts: Mapping[str, Tensor], weight: Tensor, matrix: Matrix, *, optimize: bool, solver: Solver
) -> None:
    """As :func:`quantize`, but writes ``parts``, which may be those of a record.

    With ``optimize`` the solver looks for the best zeros; without it the groups' extremes
    decide, faster and less exact.
    """
    results = solver.solve(weight, matrix, parts[f"{matrix.name}.q"], optimize=optimize)
    for name, values in zip((f"{matrix.name}.scale", f"{matrix.name}.zero"), results, strict=True):
        if not matrix.meta_group_size:
            halves = parts[name]
            halves.copy_(values)
            _check(name, values, halves)
            continue
        q, scale, zero = solver.quantize_meta(values.view(-1), matrix.meta_group_size)
        _check(name, values, scale, zero)
        parts[f"{name}.q"].copy_(q.view(values.shape))
        parts[f"{name}.scale"].copy_(scale)
        parts[f"{name}.zero"].copy_(zero)


def _check(name: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in values):
        raise ValueError(f"{name} is not finite in fp16: the weights are damaged or too large")

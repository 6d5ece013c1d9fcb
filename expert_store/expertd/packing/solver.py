"""Who decides on the integers, scales and zeros of a matrix: three solvers, one seam.

All three are Half-Quadratic Quantization (Badri & Shaji, 2023): ours in native code, the
authors' package ``hqq`` on the CPU where there is no native code, and ``hqq`` on a GPU.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expertd.packing.hqq_solver import HqqSolver
from expertd.packing.native_solver import NativeSolver
from expertstore.errors import ConfigError, PreconditionError
from expertstore.pack.layout import Matrix


class Solver(Protocol):
    """Decides; equal weights give equal results, on any number of cores."""

    version: str
    """Changes when the results do."""

    def solve(
        self,
        weight: Tensor,
        matrix: Matrix,
        q: Tensor,
        *,
        optimize: bool,
        scales: torch.dtype = torch.float16,
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero (float32, [out, groups]) of ``weight`` [out, in] (floating).

        The packed integers go to ``q``, the part of that name. ``optimize`` moves the zeros to
        where the error is least; without it the groups' extremes decide. Scale or zero of a
        group is not finite if one of its weights is not. ``scales`` is what the scale will be
        stored as: float16, bfloat16 or, where it is quantized once more, float32.
        """

    def quantize_meta(
        self, values: Tensor, group_size: int, scales: torch.dtype = torch.float16
    ) -> tuple[Tensor, Tensor, Tensor]:
        """8-bit integers (uint8) of ``values`` (float32, flat), scales and zeros (float16).

        ``scales``: the type of their scales, float16 or bfloat16.
        """


@dataclass(frozen=True)
class ChosenSolver:
    """A solver, and in a sentence what is worse about it than about another; or empty."""

    solver: Solver
    drawback: str = ""


def choose_solver(device: str = "cpu") -> ChosenSolver:
    """The fastest solver for ``device``: cpu, cuda, or cuda and a number.

    Raises :class:`ConfigError` for another device, :class:`PreconditionError` if it is not there.
    """
    kind, _, number = device.partition(":")
    if kind == "cuda" and (not number or number.isdecimal()):
        if int(number or 0) >= torch.cuda.device_count():
            raise PreconditionError(
                f"torch finds {torch.cuda.device_count()} CUDA devices, so there is no {device}; "
                "quantize with --device cpu."
            )
        return ChosenSolver(HqqSolver(device))
    if device != "cpu":
        raise ConfigError(f"Weights cannot be quantized on {device!r}; give cpu, cuda or cuda:N.")
    found = NativeSolver.load()
    if isinstance(found, NativeSolver):
        return ChosenSolver(found)
    return ChosenSolver(HqqSolver(), f"{found}, so hqq's solver runs: it takes 50 times as long.")

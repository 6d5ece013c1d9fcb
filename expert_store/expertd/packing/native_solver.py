"""Half-Quadratic Quantization (Badri & Shaji, 2023) in native code: all of a group in registers.

``expertd/native/hqq_lanes.h`` has the method, and where it differs from the package ``hqq``: each
group stops on its own, and a group whose weights span less than 1e-4 is not taken for constant.
"""

import ctypes
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

import expertd.native
from expertd.packing.cores import cores
from expertstore.native import load
from expertstore.pack.layout import ROWS_PER_BYTE, Matrix

LIBRARY = Path(expertd.native.__file__).with_name("libexpertd_packing.so")
ABI = 2
VERSION = 2
"""Of the method: to be raised when the bytes it gives change."""
TASK_ELEMENTS = 1 << 20
"""Weights that a core takes at a time, some milliseconds."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""By their number in native code."""
_SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""What scales are stored as, by its number in native code."""


class _HqqMatrix(ctypes.Structure):
    """``HqqMatrix`` of ``hqq.h``."""

    _fields_: ClassVar = [
        ("weight", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("optimize", ctypes.c_int32),
        ("scales", ctypes.c_int32),
    ]


class NativeSolver:
    """Calls ``libexpertd_packing.so``; ``variants`` are those that this processor can run."""

    version = f"native hqq {VERSION}"

    def __init__(self, library: ctypes.CDLL, variant: str | None = None) -> None:
        """``variant`` in place of the fastest; all give the same bytes."""
        self._library = library
        library.expertd_hqq_variant.restype = ctypes.c_char_p
        library.expertd_hqq_units.argtypes = [
            ctypes.POINTER(_HqqMatrix), ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p,
        ]  # fmt: skip
        library.expertd_quantize_meta.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32,
            *3 * [ctypes.c_void_p],
        ]  # fmt: skip
        self.variants: list[str] = []
        while name := library.expertd_hqq_variant(len(self.variants)):
            self.variants.append(name.decode())
        self.variant = variant or self.variants[0]

    @classmethod
    def load(cls, variant: str | None = None) -> Self | str:
        """The solver, or why there is none."""
        loaded = load(LIBRARY, abi=ABI, structures={"HqqMatrix": _HqqMatrix})
        return loaded.reason if loaded.library is None else cls(loaded.library, variant)

    def solve(
        self,
        weight: Tensor,
        matrix: Matrix,
        q: Tensor,
        *,
        optimize: bool,
        scales: torch.dtype = torch.float16,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`expertd.packing.solver.Solver`."""
        if weight.dtype not in _DTYPES:
            weight = weight.to(torch.float32)
        weight = weight.contiguous()
        groups = (matrix.out_features, matrix.in_features // matrix.group_size)
        if not q.is_contiguous() or weight.shape != (matrix.out_features, matrix.in_features):
            raise AssertionError
        scale, zero = torch.empty(groups), torch.empty(groups)
        job = _HqqMatrix(
            weight.data_ptr(), q.data_ptr(), scale.data_ptr(), zero.data_ptr(),
            matrix.out_features, matrix.in_features, matrix.bits, matrix.group_size,
            _DTYPES.index(weight.dtype), optimize, _SCALES[scales],
        )  # fmt: skip
        # A unit is the rows that share bytes.
        num_rows = ROWS_PER_BYTE[matrix.bits]
        num_units = matrix.out_features // num_rows
        step = max(1, TASK_ELEMENTS // (num_rows * matrix.in_features))

        def run(begin: int) -> None:
            end = min(begin + step, num_units)
            if self._library.expertd_hqq_units(job, begin, end, self.variant.encode()):
                raise ValueError(f"this processor cannot run {self.variant}")

        list(cores().map(run, range(0, num_units, step)))
        return scale, zero

    def quantize_meta(
        self, values: Tensor, group_size: int, scales: torch.dtype = torch.float16
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`expertd.packing.solver.Solver`."""
        q = torch.empty(values.numel(), dtype=torch.uint8)
        num_groups = values.numel() // group_size
        scale = torch.empty(num_groups, dtype=scales)
        zero = torch.empty(num_groups, dtype=torch.float16)
        self._library.expertd_quantize_meta(
            values.data_ptr(), values.numel(), group_size, _SCALES[scales],
            q.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        )  # fmt: skip
        return q, scale, zero

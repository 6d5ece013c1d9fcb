"""Products of plain linear layers as native calls.

A matrix is described once and then multiplied many times: torch takes a microsecond or three for
every operation, which is much of a small product with one row.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from expertd_inference.kernels.cpu.library import TYPES, check_memory, native_library
from expertd_inference.kernels.cpu.library import describe as describe
from expertd_inference.kernels.cpu.native import flags_of, measured
from expertd_inference.kernels.cpu.structures import LinearCall, NativeMatrix
from expertd_inference.kernels.cpu.switching import LEAST, MostRows, any_number
from expertstore.pack.layout import Encoding, Matrix

DTYPES = (torch.bfloat16, torch.float32)
"""What these products and the other operations of a program compute with."""


class PreparedCall:
    """A matrix and its address, for :meth:`LinearKernels.multiply`."""

    __slots__ = ("address", "matrix")

    def __init__(self, matrix: NativeMatrix) -> None:
        self.matrix = matrix
        self.address = ctypes.addressof(matrix)


class LinearKernels:
    """Native products of rows and plain matrices on the CPU, of one dtype of :data:`DTYPES`."""

    def __init__(self, library: ctypes.CDLL, *, activations: int = 16, exact: bool = False) -> None:
        """As :class:`.native.NativeKernels`, whose flags these are."""
        self.most_rows: MostRows = any_number if exact else measured(activations)
        """How many rows of a plain matrix are multiplied here, and not by torch."""
        self._flags = flags_of(activations, exact=exact)
        self._linear: Any = library.expertd_linear

    def takes(self, num_rows: int, weight: Tensor) -> bool:
        """Whether so many rows times a plain ``weight`` [out, in] are for these kernels."""
        if num_rows <= LEAST:
            return True
        most = self.most_rows(plain_matrix(weight), weight.dtype)
        return most is None or num_rows <= most

    def multiply(
        self, prepared: PreparedCall, rows: Tensor, out: Tensor, num_rows: int = 1
    ) -> None:
        """Contiguous ``rows`` [n, in], times the weight, into ``out`` [n, out]; of one dtype."""
        call = LinearCall(
            prepared.address,
            rows.data_ptr(),
            out.data_ptr(),
            num_rows,
            TYPES[rows.dtype],
            torch.get_num_threads(),
            self._flags,
        )
        check_memory(self._linear(ctypes.addressof(call)))


def plain_matrix(weight: Tensor) -> Matrix:
    """The form of a plain ``weight`` [out, in]."""
    return Matrix("plain", Encoding.PLAIN, *weight.shape)


def linear_kernels(*, activations: int = 16, exact: bool = False) -> LinearKernels | None:
    """The kernels, or None where native code is not built or turned off."""
    library = native_library().library
    return None if library is None else LinearKernels(library, activations=activations, exact=exact)

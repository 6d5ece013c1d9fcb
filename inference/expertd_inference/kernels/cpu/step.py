"""The small operations between the matrices of a decoding step, each as one native call.

Torch takes a microsecond or three for every operation, and a decoder layer has about sixty for a
single token. What is here is rounded where transformers' modules round it, and otherwise differs
by the order of float32 sums. All but attention to many tokens runs on the calling thread: for few
rows only.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from expertd_inference.kernels.cpu.library import TYPES, check_memory, native_library
from expertd_inference.kernels.cpu.library import describe as describe
from expertd_inference.kernels.cpu.native import (
    flags_of,
    matrix_of,
    measured,
    multiply,
)
from expertd_inference.kernels.cpu.structures import LinearCall, NativeMatrix
from expertd_inference.kernels.cpu.switching import LEAST, MostRows, any_number
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.pack.layout import Encoding, Matrix

DTYPES = (torch.bfloat16, torch.float32)
"""What these operations compute with."""

_POINTERS_3 = [c_void_p] * 3
_SIGNATURES = {
    "expertd_rms_norm": [*_POINTERS_3, c_int64, c_int64, c_float, c_int32, c_int32],
    "expertd_rotate": [c_void_p] * 6 + [c_int64] * 5 + [c_int32],
    "expertd_route": [
        c_void_p, *[c_int64] * 3, c_int32, c_int32, c_void_p, c_void_p, c_int32,
    ],
}  # fmt: skip

_RESULTS = {"expertd_route": c_int32}


class PreparedCall:
    """A matrix as the kernels take it."""

    __slots__ = ("address", "matrix")

    def __init__(self, matrix: NativeMatrix) -> None:
        self.matrix = matrix
        self.address = ctypes.addressof(matrix)


class StepKernels:
    """The native functions. Tensors are on the CPU, of one dtype of :data:`DTYPES`."""

    def __init__(self, library: ctypes.CDLL, *, activations: int = 16, exact: bool = False) -> None:
        """As :class:`.native.NativeKernels`, whose flags these are."""
        self.most_rows: MostRows = any_number if exact else measured(activations)
        """How many rows of a plain matrix are multiplied here, and not by torch."""
        self._flags = flags_of(activations, exact=exact)
        self._library: Any = library
        self._rms_norm, self._rotate, self._route = (
            _function(library, name) for name in _SIGNATURES
        )
        self._linear: Any = library.expertd_linear

    def takes(self, num_rows: int, weight: Tensor) -> bool:
        """Whether so many rows times a plain ``weight`` [out, in] are for these kernels."""
        if num_rows <= LEAST:
            return True
        most = self.most_rows(plain_matrix(weight), weight.dtype)
        return most is None or num_rows <= most

    def linear(self, rows: Tensor, weight: Tensor, described: NativeMatrix) -> Tensor:
        """Contiguous ``rows`` [n, in] times ``weight`` [out, in], of one dtype: [n, out].

        ``described`` is :func:`describe`'s of the weight.
        """
        return multiply(self._library, rows, described, self._flags)

    def prepare(self, weight: QuantizedWeight) -> PreparedCall | None:
        """A call for one row times ``weight``, or None if no kernel knows it."""
        matrix = matrix_of(weight)
        return None if matrix is None else PreparedCall(matrix)

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

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, round_first: bool) -> Tensor:
        """``weight * x / sqrt(mean(x²) + eps)`` over the last dimension of contiguous ``x``.

        With ``round_first`` the quotient is rounded before it meets the weight.
        """
        result = torch.empty_like(x)
        n = x.shape[-1]
        self._rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            result.data_ptr(),
            x.numel() // n,
            n,
            eps,
            round_first,
            TYPES[x.dtype],
        )
        return result

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary position embedding, in halves, of one token: [1, heads, 1, d] both.

        ``cos`` and ``sin`` are [1, 1, d] without gaps. The same bits as torch's operations give.
        """
        _, heads, _, d = query.shape
        kv_heads = key.shape[1]
        turned = query.new_empty(1, heads, 1, d), key.new_empty(1, kv_heads, 1, d)
        self._rotate(
            query.data_ptr(),
            key.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            turned[0].data_ptr(),
            turned[1].data_ptr(),
            heads,
            kv_heads,
            d,
            query.stride(1),
            key.stride(1),
            TYPES[query.dtype],
        )
        return turned

    def route(
        self, logits: Tensor, k: int, *, normalize: bool, float_weights: bool
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` likeliest of each row of ``logits`` [T, E]: weights and experts, [T, k] each.

        Weights are their probabilities by softmax, with ``normalize`` divided by their sum,
        float32 or of the logits' dtype.
        """
        rows, n = logits.shape
        index = logits.new_empty(rows, k, dtype=torch.int64)
        weights = logits.new_empty(rows, k, dtype=torch.float32 if float_weights else None)
        status = self._route(
            logits.data_ptr(),
            rows,
            n,
            k,
            normalize,
            float_weights,
            weights.data_ptr(),
            index.data_ptr(),
            TYPES[logits.dtype],
        )
        check_memory(status)
        return weights, index


def plain_matrix(weight: Tensor) -> Matrix:
    """The form of a plain ``weight`` [out, in]."""
    return Matrix("plain", Encoding.PLAIN, *weight.shape)


def step_kernels(*, activations: int = 16, exact: bool = False) -> StepKernels | None:
    """The kernels, or None where native code is not built or turned off."""
    library = native_library().library
    return None if library is None else StepKernels(library, activations=activations, exact=exact)


def _function(library: ctypes.CDLL, name: str) -> Any:  # noqa: ANN401 - ctypes' own
    function: Any = library[name]
    function.argtypes = _SIGNATURES[name]
    function.restype = _RESULTS.get(name)
    return function

"""Operations on one token, strung together and run by one native call: ``native/program.h``.

Operations are given addresses, of memory that must outlive the program; whoever builds one keeps
the tensors. The results are those of the single operations (:mod:`.step`), bit for bit.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

from expertd_inference.kernels.cpu.library import LinearCall


class EmbedCall(ctypes.Structure):
    """A token's row of a table [tokens, n]."""

    _fields_ = (("table", c_void_p), ("out", c_void_p), ("row_bytes", c_int64))


class AddCall(ctypes.Structure):
    """The sum of two rows of n."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "y", "out")),
        ("n", c_int64),
        *((name, c_int32) for name in ("type", "padding")),
    )


class NormCall(ctypes.Structure):
    """As :meth:`.step.StepKernels.rms_norm`."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "out")),
        *((name, c_int64) for name in ("rows", "n")),
        ("eps", c_float),
        *((name, c_int32) for name in ("round_first", "type", "padding")),
    )


class AttendCall(ctypes.Structure):
    """Norms of heads if there are weights for it, rotation, append, and attention to all."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "q_weight", "k_weight", "cos", "sin")),
        *((name, c_void_p) for name in ("keys", "values", "turned", "out")),
        *((name, c_int64) for name in ("heads", "kv_heads", "d", "room")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_int32) for name in ("round_first", "type")),
    )


class RouteCall(ctypes.Structure):
    """As :meth:`.step.StepKernels.route`, of one row."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "weights", "index")),
        *((name, c_int64) for name in ("n", "k")),
        *((name, c_int32) for name in ("normalize", "float_weights", "type", "padding")),
    )


class _Operation(ctypes.Structure):
    _fields_ = (("kind", c_int32), ("beside", c_int32), ("call", c_void_p))


Call = EmbedCall | AddCall | NormCall | LinearCall | AttendCall | RouteCall

_KINDS: dict[type[ctypes.Structure], int] = {
    kind: number
    for number, kind in enumerate((EmbedCall, AddCall, NormCall, LinearCall, AttendCall, RouteCall))
}


class Program:
    """Operations in their order; :meth:`.step.StepKernels.run` runs them."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._operations: list[_Operation] = []
        self._array: Any = None
        self.address = 0
        """Of the operations, which are at least one."""

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call, *, beside: bool = False) -> None:
        """Appends an operation, whose structure stays the caller's to change between runs.

        ``beside``: a product that does not need the product before it, so both run at once.
        """
        self._calls.append(call)
        self._operations.append(_Operation(_KINDS[type(call)], beside, ctypes.addressof(call)))
        self._array = (_Operation * len(self))(*self._operations)
        self.address = ctypes.addressof(self._array)

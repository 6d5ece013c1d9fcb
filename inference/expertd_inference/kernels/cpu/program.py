"""Operations on the rows of a step, run by one native call: ``native/program.h``.

Operations are given addresses, of memory that must outlive the program; whoever builds one keeps
the tensors. Memory of rows has room for the most rows that a run has. Results are rounded where
torch rounds, and those of a row do not depend on the rows beside it.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any, Final

from expertd_inference.kernels.cpu.library import (
    AttentionCall,
    NativeActivation,
    check_memory,
    native_library,
)
from expertstore.errors import PreconditionError

_Fields = list[tuple[str, Any]]


def _pointers(*names: str) -> _Fields:
    return [(name, c_void_p) for name in names]


def _counts(*names: str) -> _Fields:
    return [(name, c_int64) for name in names]


def _numbers(*names: str) -> _Fields:
    return [(name, c_int32) for name in names]


class EmbedCall(ctypes.Structure):
    """Each row's token in a table [tokens, n]."""

    _fields_ = (*_pointers("table", "out"), *_counts("row_bytes"))


class GatherCall(ctypes.Structure):
    """The rows whose logits are wanted, one after the other."""

    _fields_ = (*_pointers("x", "out"), *_counts("row_bytes"))


class AddCall(ctypes.Structure):
    """The sum of rows of n; ``y_row`` is n, or 0 for one y for all."""

    _fields_ = (*_pointers("x", "y", "out"), *_counts("n", "y_row"), *_numbers("type", "padding"))


class ScaleCall(ctypes.Structure):
    """Rows of n times a factor, or divided by it."""

    _fields_ = (
        *_pointers("x", "out"),
        *_counts("n"),
        ("factor", c_float),
        *_numbers("divide", "type", "padding"),
    )


class NormKind(IntEnum):
    """What a norm computes."""

    RMS = 0
    """weight * x / sqrt(mean(x²) + eps), rounded once."""
    RMS_ROUND = 1
    """The quotient is rounded before it meets the weight."""
    LAYER = 2
    """(x - mean) / sqrt(variance + eps) * weight + bias."""


class NormCall(ctypes.Structure):
    """Each of the groups of n of a row, by itself; weight and bias are float32."""

    _fields_ = (
        *_pointers("x", "weight", "bias", "out"),
        *_counts("groups", "n"),
        ("eps", c_float),
        *_numbers("kind", "type", "padding"),
    )


class ProductCall(ctypes.Structure):
    """Rows times a matrix, transposed, with its bias."""

    _fields_ = (*_pointers("matrix", "x", "out"), *_numbers("type", "out_type"))


class RotateCall(ctypes.Structure):
    """Rotary embedding, in place, by float32 tables [positions, turned / 2]."""

    _fields_ = (
        *_pointers("x", "cos", "sin"),
        *_counts("heads", "d", "turned"),
        *_numbers("pairs", "type"),
    )


class RouteKind(IntEnum):
    """How experts are chosen by their logits."""

    SOFTMAX = 0
    """Softmax of all, and then the likeliest."""
    TOP_SOFTMAX = 1
    """The likeliest, and then softmax of these."""
    SIGMOID = 2
    """Sigmoid of each; by it and a bias the best are chosen, of the best groups."""
    SPARSE_MIXER = 3
    """Phi-MoE's: two, each with its softmax among those that are near it."""


class RouteCall(ctypes.Structure):
    """``k`` of ``n`` experts, by logits: their int64 numbers and their weights."""

    _fields_ = (
        *_pointers("logits", "weights", "index", "bias"),
        *_counts("n", "k", "groups", "top_groups"),
        *_numbers("kind", "normalize", "type", "weights_type"),
        ("scale", c_float),
        *_numbers("padding"),
    )


class ActivateCall(ctypes.Structure):
    """What a gated feed-forward has between its matrices."""

    _fields_ = (
        *_pointers("gate", "up", "out"),
        *_counts("n"),
        ("activation", NativeActivation),
        *_numbers("type"),
    )


class GateCall(ctypes.Structure):
    """x * sigmoid(gate), where a row's gate has ``gate_n`` elements: one, or n."""

    _fields_ = (
        *_pointers("x", "gate", "out"),
        *_counts("n", "gate_n"),
        *_numbers("type", "padding"),
    )


class StepCall(ctypes.Structure):
    """What a run computes: addresses of int64 values of its rows, and the attention's plan.

    ``flags`` are those of :mod:`.library`.
    """

    _fields_ = (
        *_pointers("tokens", "positions", "wanted"),
        *_counts("rows", "num_wanted"),
        *_pointers("plan"),
        *_numbers("threads", "flags"),
    )


class _Operation(ctypes.Structure):
    _fields_ = (*_numbers("kind", "beside", "wanted", "padding"), *_pointers("call"))


Call = (
    EmbedCall
    | GatherCall
    | AddCall
    | ScaleCall
    | NormCall
    | ProductCall
    | RotateCall
    | AttentionCall
    | RouteCall
    | ActivateCall
    | GateCall
)

_KINDS: Final[dict[type[ctypes.Structure], int]] = {
    kind: number
    for number, kind in enumerate(
        (
            EmbedCall,
            GatherCall,
            AddCall,
            ScaleCall,
            NormCall,
            ProductCall,
            RotateCall,
            AttentionCall,
            RouteCall,
            ActivateCall,
            GateCall,
        )
    )
}


class RowsProgram:
    """Operations in their order, planned when the first run begins."""

    def __init__(self) -> None:
        """Raises PreconditionError where there is no native library."""
        loaded = native_library()
        if loaded.library is None:
            raise PreconditionError(f"There are no native kernels: {loaded.reason}.")
        self._library: Any = loaded.library
        self._calls: list[Call] = []
        self._operations: list[_Operation] = []
        self._made: int | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call, *, beside: bool = False, wanted: bool = False) -> None:
        """Appends an operation; its structure stays the caller's to change between runs.

        ``beside``: a product that does not need the product before it, so both run at once.
        ``wanted``: on the rows whose logits are wanted, and else on all.
        """
        self._calls.append(call)
        self._operations.append(
            _Operation(_KINDS[type(call)], beside, wanted, 0, ctypes.addressof(call))
        )

    def made(self) -> int:
        """The address of the native program, to which nothing is added any more.

        Raises MemoryError.
        """
        if self._made is None:
            array = (_Operation * len(self))(*self._operations)
            self._made = self._library.expertd_program_make(array, len(self))
            check_memory(not self._made)
        assert self._made is not None
        return self._made

    def run(self, step: int) -> None:
        """Runs all operations; ``step`` is the address of a :class:`StepCall`.

        Raises MemoryError.
        """
        status = self._library.expertd_program_run(self._made or self.made(), step)
        if status:
            check_memory(status)

    def __del__(self) -> None:
        if getattr(self, "_made", None):
            self._library.expertd_program_free(self._made)

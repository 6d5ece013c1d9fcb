"""The operations of a program and what runs it is given, as ``native/program.h`` has them.

Addresses are of memory that must outlive the program. Memory of rows has room for the most rows
that a run has.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

from expertd_inference.kernels.cpu.structures import NativeActivation

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

    ``flags`` are those of :mod:`.library`. ``most_experts`` and the float32 ``least_share`` say
    how few experts a row is computed by, and are null where all that routers choose compute it;
    ``kept`` counts these.
    """

    _fields_ = (
        *_pointers("tokens", "positions", "wanted"),
        *_counts("rows", "num_wanted"),
        *_pointers("plan"),
        *_numbers("threads", "flags"),
        *_pointers("most_experts", "least_share", "kept"),
    )


class Operation(ctypes.Structure):
    """One operation of a program: which kind, and the address of its structure."""

    _fields_ = (*_numbers("kind", "beside", "wanted", "padding"), *_pointers("call"))


class HeldSegment(ctypes.Structure):
    """A program and the experts of one layer; an expert has at most ``most_rows`` rows."""

    _fields_ = (
        *_pointers("program", "call", "words"),
        *_counts("num_experts", "first_entry", "most_rows"),
    )


class HeldStep(ctypes.Structure):
    """Segments whose experts are in RAM; ``used`` gets the directory's entries of these."""

    _fields_ = (
        *_pointers("segments"),
        *_counts("num_segments", "first"),
        *_pointers("step", "arena", "used"),
        *_counts("num_used"),
    )

"""What the native kernels are called with, as ``native/kernels.h`` and its neighbours declare it.

A matrix is described once, and a call is a structure of addresses and sizes: ctypes takes about
two microseconds for it, however much the call computes.
"""

import ctypes


class NativeMatrix(ctypes.Structure):
    """``Matrix`` of kernels.h; -1 for what is not there."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "weight")),
        *((name, ctypes.c_int64) for name in ("scale", "scale_scale", "scale_zero")),
        *((name, ctypes.c_int64) for name in ("zero", "zero_scale", "zero_zero", "bias")),
        *((name, ctypes.c_int32) for name in ("format", "group_size")),
        *((name, ctypes.c_int32) for name in ("meta_group_size", "bias_format")),
        *((name, ctypes.c_int32) for name in ("scale_format", "group_rows")),
    )


class NativeActivation(ctypes.Structure):
    """``Activation`` of kernels.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class NativeLayer(ctypes.Structure):
    """``Layer`` of kernels.h."""

    _fields_ = (
        ("gate_up", NativeMatrix),
        ("down", NativeMatrix),
        ("activation", NativeActivation),
        ("padding", ctypes.c_int32),
    )


class NativeExpertsCall(ctypes.Structure):
    """``ExpertsCall`` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layer", "arena", "experts", "records")),
        *((name, ctypes.c_void_p) for name in ("hidden", "top_k_index", "top_k_weights")),
        *((name, ctypes.c_void_p) for name in ("slots", "out")),
        *((name, ctypes.c_int64) for name in ("num_experts", "tokens", "k")),
        *((name, ctypes.c_int32) for name in ("type", "weights_type", "slots_type", "threads")),
        *((name, ctypes.c_int32) for name in ("flags", "padding")),
    )


class LinearCall(ctypes.Structure):
    """``LinearCall`` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "out")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("type", "threads", "flags", "padding")),
    )


class NativeAttentionPlan(ctypes.Structure):
    """``AttentionPlan`` of attention.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("positions", "first_rows", "first_blocks", "blocks")
        ),
        ("num_spans", ctypes.c_int64),
    )


class AttentionCall(ctypes.Structure):
    """``AttentionCall`` of attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plan", "query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "out", "sinks")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "key_width", "value_width")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "key_row", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_row", "value_head", "out_row", "out_head")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    )


class DeltaCall(ctypes.Structure):
    """``DeltaCall`` of delta.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("states", "from_places", "to_places", "query")),
        *((name, ctypes.c_void_p) for name in ("key", "value", "beta", "decay", "out")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "key_heads")),
        *((name, ctypes.c_int64) for name in ("keys", "values", "decays")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    )

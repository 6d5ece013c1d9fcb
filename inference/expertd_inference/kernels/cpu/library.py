"""The native kernels' library, loaded once, and how matrices and layers are described to it."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.cpu import operations
from expertd_inference.kernels.cpu.structures import (
    AttentionCall,
    DeltaCall,
    LinearCall,
    NativeActivation,
    NativeAttentionPlan,
    NativeExpertsCall,
    NativeLayer,
    NativeMatrix,
)
from expertd_inference.kernels.wave import ExpertsSpec
from expertstore.native import Loaded, load
from expertstore.pack.layout import (
    DOWN,
    Encoding,
    Matrix,
    RecordLayout,
    has_float_scales,
    matrix_parts,
    scale_part,
)

PATH = Path(__file__).parents[1] / "native" / "libexpertd_kernels.so"
ABI = 8
GROUP_SIZES = (16, 32, 64, 128)
META_GROUP_SIZE = 128

EXACT, EIGHT_BIT_ACTIVATIONS = 1, 2
"""Flags of calls, as kernels.h has them."""
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Types of activations by number; plain weights have the same ones as formats."""
_PLAIN = {"BF16": 0, "F16": 1, "F32": 2}
_HQQ = {8: 3, 4: 4, 3: 5, 2: 6}
_KEPT = {Encoding.MXFP4: 7, Encoding.NVFP4: 8, Encoding.FP8: 9, Encoding.MXFP8: 10}
_ACTIVATIONS = {
    ActivationKind.SILU: 0,
    ActivationKind.GELU: 1,
    ActivationKind.GELU_TANH: 2,
    ActivationKind.RELU: 3,
    ActivationKind.GPT_OSS: 4,
    ActivationKind.RELU2: 5,
}


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "Matrix": NativeMatrix,
    "Activation": NativeActivation,
    "Layer": NativeLayer,
    "ExpertsCall": NativeExpertsCall,
    "LinearCall": LinearCall,
    "AttentionPlan": NativeAttentionPlan,
    "AttentionCall": AttentionCall,
    "DeltaCall": DeltaCall,
    **{
        each.__name__: each
        for each in (
            *(operations.EmbedCall, operations.GatherCall, operations.AddCall),
            *(operations.ScaleCall, operations.NormCall, operations.ProductCall),
            *(operations.RotateCall, operations.RouteCall, operations.ActivateCall),
            *(operations.GateCall, operations.Operation, operations.StepCall),
            *(operations.HeldSegment, operations.HeldStep),
        )
    },
}
"""All that cross the border, by their names in native code: sizes are compared at load."""
_FUNCTIONS = tuple(
    f"expertd_{name}"
    for name in (
        *("experts", "linear", "dequantize", "attend_rows", "use_isa", "isa", "read_probe"),
        *("program_make", "program_free", "program_run", "held_step", "delta"),
    )
)


def check_memory(status: int) -> None:
    """Raises MemoryError unless a native function's answer is 0."""
    if status:
        raise MemoryError("There is no memory left for the kernels' intermediate results.")


@cache
def native_library() -> Loaded:
    """The library with its functions declared, or why it is not there. Loaded once."""
    loaded = load(PATH, abi=ABI, functions=_FUNCTIONS, structures=STRUCTURES)
    library = loaded.library
    if library is not None:
        library.expertd_experts.argtypes = [ctypes.c_void_p]
        library.expertd_linear.argtypes = [ctypes.c_void_p]
        library.expertd_dequantize.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
        ]
        library.expertd_read_probe.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)
        ]
        library.expertd_delta.argtypes = [ctypes.c_void_p]
        library.expertd_attend_rows.argtypes = [ctypes.c_void_p]
        library.expertd_program_make.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.expertd_program_make.restype = ctypes.c_void_p
        library.expertd_held_step.argtypes = [ctypes.c_void_p]
        library.expertd_held_step.restype = ctypes.c_int64
        library.expertd_program_free.argtypes = [ctypes.c_void_p]
        library.expertd_program_free.restype = None
        library.expertd_program_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.expertd_use_isa.argtypes = [ctypes.c_char_p]
        library.expertd_use_isa.restype = ctypes.c_char_p
        library.expertd_isa.restype = ctypes.c_char_p
    return loaded


def native_matrix(
    matrix: Matrix,
    place: Callable[[str], int],
    plain: str,
    bias: tuple[str, int] | None = None,
    scales: str = "F16",
) -> NativeMatrix | None:
    """``matrix`` for the kernels, or None if they do not know its form.

    ``place`` tells where a part is, by its full name; ``plain`` is the type of its weights if
    they are not quantized, ``bias`` the type and place of its bias, and ``scales`` the type of
    what scales them if they are.
    """
    native = NativeMatrix(
        rows=matrix.out_features,
        columns=matrix.in_features,
        group_size=matrix.group_size,
        meta_group_size=matrix.meta_group_size,
        scale_format=_PLAIN[scales],
        group_rows=matrix.group_rows,
        **dict.fromkeys(("weight", "scale", "scale_scale", "scale_zero", "zero"), -1),
        **dict.fromkeys(("zero_scale", "zero_zero", "bias"), -1),
    )
    if bias is not None:
        if bias[0] not in _PLAIN:
            return None
        native.bias_format, native.bias = _PLAIN[bias[0]], bias[1]
    if matrix.encoding is Encoding.PLAIN:
        if plain not in _PLAIN:
            return None
        native.format, native.weight = _PLAIN[plain], place(f"{matrix.name}.weight")
        return native
    if not _has_groups(matrix) or matrix.meta_group_size not in (0, META_GROUP_SIZE):
        return None
    native.format = _KEPT.get(matrix.encoding) or _HQQ[matrix.bits]
    for name, _, _ in matrix_parts(matrix, ""):
        part = name.removeprefix(f"{matrix.name}.")
        if part == "q":
            field = "weight"
        elif part == "global":
            field = "scale_scale"
        elif part.endswith(".q"):
            field = part.removesuffix(".q")
        else:
            field = part.replace(".", "_")
        setattr(native, field, place(name))
    return native


def _has_groups(matrix: Matrix) -> bool:
    """Whether kernels know groups of such a size; of FP8 a register may have to be of one group."""
    if matrix.encoding is not Encoding.FP8:
        return matrix.group_size in GROUP_SIZES
    group = matrix.group_size
    return group == 32 or not group % 64 or group >= matrix.in_features


def describe(weight: Tensor, bias: Tensor | None = None) -> NativeMatrix:
    """A contiguous ``weight`` [out, in] for the kernels, as long as it lives, and ``bias`` [out].

    The bias is added before the product is rounded.
    """
    rows, columns = weight.shape
    absent = dict.fromkeys(("scale", "scale_scale", "scale_zero", "zero"), -1)
    absent |= dict.fromkeys(("zero_scale", "zero_zero"), -1)
    return NativeMatrix(
        rows=rows,
        columns=columns,
        weight=weight.data_ptr(),
        bias=-1 if bias is None else bias.data_ptr(),
        format=TYPES[weight.dtype],
        bias_format=0 if bias is None else TYPES[bias.dtype],
        **absent,
    )


def native_layer(spec: ExpertsSpec) -> NativeLayer | None:
    """The layer for the kernels, or None if they do not know a part of it."""
    if spec.activation is None:
        return None
    gate_up, down = (_of_record(spec.layout, name) for name in (spec.layout.inward.name, DOWN))
    if gate_up is None or down is None:
        return None
    return NativeLayer(gate_up=gate_up, down=down, activation=native_activation(spec.activation))


def _of_record(layout: RecordLayout, name: str) -> NativeMatrix | None:
    parts = {part.name: part for part in layout.parts}
    bias = parts.get(f"{name}.bias")
    weight = parts.get(f"{name}.weight")
    matrix = layout.matrix(name)
    return native_matrix(
        matrix,
        lambda part: parts[part].offset,
        "" if weight is None else weight.dtype,
        None if bias is None else (bias.dtype, bias.offset),
        parts[scale_part(matrix)].dtype if has_float_scales(matrix) else "F16",
    )


def native_activation(activation: Activation) -> NativeActivation:
    """The activation for the kernels."""
    return NativeActivation(_ACTIVATIONS[activation.kind], activation.alpha, activation.limit)

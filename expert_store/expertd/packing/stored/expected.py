"""The form in which a configuration says that a matrix is stored, before there are tensors."""

import re
from typing import Any

from expertd.packing.schemes import MXFP4, MXFP8, NVFP4
from expertd.packing.stored.description import Description, read_block
from expertd.packing.stored.weight import Form, fp8_form, integer_form
from expertstore.pack.layout import Encoding


def expected_form(description: Description, parameter: str, shape: tuple[int, int]) -> Form | None:
    """Of the weight [out, in] of ``parameter`` (``model.layers.0.mlp.experts.gate_up_proj``).

    None if it is in 16 bits, or in a form that no record has.
    """
    # Checkpoints have experts one by one, and so have the lists of what is not quantized.
    module = re.sub(r"\.experts\.(gate_up|up|down)_proj", r".experts.0.\1_proj", parameter)
    module = module.replace(".gate_up_proj", ".gate_proj").removesuffix(".weight")
    fields, method = description.fields, description.method
    if not method or module.endswith("lm_head") or description.is_ignored(module):
        return None
    if method == "mxfp4":
        return Form(MXFP4) if ".experts." in module else None
    if method in {"gptq", "awq"}:
        if description.is_in_activation_order:
            return None
        size = _size(fields.get("group_size", fields.get("q_group_size", 128)), shape)
        return _of(integer_form(description.bits or 4, size, "F16", has_zeros=True))
    if method == "compressed-tensors":
        weights = description.weights(module)
        return None if weights is None else _of_weights(weights, shape)
    algorithm = description.algorithm(module)
    if "NVFP4" in algorithm:
        return Form(NVFP4)
    if method == "mxfp8" or "MXFP8" in algorithm:
        return Form(MXFP8)
    if method in {"fp8", "fbgemm_fp8", "modelopt"}:
        if ".experts." in module and description.has_fp4_experts:
            return Form(MXFP4)
        return _fp8(description.block(module) or shape, shape)
    return None


def _of_weights(weights: dict[str, Any], shape: tuple[int, int]) -> Form | None:
    """Of compressed-tensors' description of weights."""
    size = weights.get("group_size")
    if weights.get("type") == "float":
        if weights.get("num_bits") == 4:
            return Form(NVFP4 if size == NVFP4.group_size else MXFP4)
        if size == MXFP8.group_size:
            return Form(MXFP8)
        if block := read_block(weights.get("block_structure")):
            return _fp8(block, shape)
        return _fp8((1 if weights.get("strategy") == "channel" else shape[0], shape[1]), shape)
    has_zeros = weights.get("symmetric") is False
    bits = weights.get("num_bits")
    if weights.get("actorder") == "group" or not isinstance(bits, int):
        return None
    return _of(integer_form(bits, _size(size, shape), "BF16", has_zeros=has_zeros))


def _fp8(block: tuple[int, int], shape: tuple[int, int]) -> Form:
    return fp8_form((min(block[0], shape[0]), min(block[1], shape[1])))


def _size(size: object, shape: tuple[int, int]) -> int:
    """Of a group: all inputs, unless there is a number."""
    return size if isinstance(size, int) and size > 0 else shape[1]


def _of(form: Form | str) -> Form | None:
    if isinstance(form, str) or form.precision.encoding is Encoding.PLAIN:
        return None
    return form

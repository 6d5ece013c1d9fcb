"""Stored weights whose values are integers in groups with a scale and a zero, by their headers."""

import math

from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.stored.pieces import Pieces
from expertd.packing.stored.weight import Form, Packing, StoredWeight, integer_form
from expertstore.errors import CheckpointError

WORD_BITS = 32
HEAD_ROWS = 32
"""Of rows whose integers fill whole words, however many bits they have."""
AWQ_BITS = 4
FACTORS = {"F32", "BF16", "F16"}
"""Types of scales that multiply."""


def find_packed(pieces: Pieces, tensor: CheckpointTensor) -> StoredWeight | None:
    """compressed-tensors' ``pack-quantized``: integers in words along the rows."""
    if not tensor.name.endswith(".weight_packed") or tensor.entry.dtype != "I32":
        return None
    name = tensor.name.removesuffix("_packed")
    scales = pieces.need(f"{name}_scale")
    *outer, rows, words = tensor.entry.shape
    bits = pieces.description.num_bits(name.removesuffix(".weight")) or 4
    columns = words * WORD_BITS // bits
    groups = scales.entry.shape[-1] if scales.entry.shape else 0
    if not groups or columns % groups:
        groups = 1
    pieces.check(scales, (*outer, rows, groups), tensor)
    found = {"packed": tensor, "scales": scales}
    head = {"packed": HEAD_ROWS, "scales": HEAD_ROWS}
    if zeros := pieces.get(f"{name}_zero_point"):
        is_packed = zeros.entry.dtype == "I32"
        zero_rows = -(-rows * bits // WORD_BITS) if is_packed else rows
        found["zeros"] = pieces.check(zeros, (*outer, zero_rows, groups), tensor)
        head["zeros"] = bits if is_packed else HEAD_ROWS
    form = integer_form(bits, columns // groups, scales.entry.dtype, has_zeros="zeros" in found)
    if order := pieces.get(f"{name}_g_idx"):
        found["order"] = pieces.check(order, (columns,), tensor)
        head |= {"order": columns}
        form = _ACTIVATION_ORDER
    return _stored(name, (*outer, rows, columns), Packing.INTEGERS, found, form, head, bits)


def find_bytes(pieces: Pieces, tensor: CheckpointTensor) -> StoredWeight | None:
    """compressed-tensors' ``int-quantized``: ``X.weight`` in int8 and ``X.weight_scale``."""
    if not tensor.name.endswith(".weight") or tensor.entry.dtype != "I8":
        return None
    scales = pieces.get(f"{tensor.name}_scale")
    if scales is None or len(tensor.entry.shape) < 2 or scales.entry.dtype not in FACTORS:
        return None
    *outer, rows, columns = tensor.entry.shape
    groups = scales.entry.shape[-1] if scales.entry.shape else 0
    if not groups or columns % groups:
        groups = 1
    found = {"packed": tensor, "scales": pieces.check(scales, (*outer, rows, groups), tensor)}
    if zeros := pieces.get(f"{tensor.name}_zero_point"):
        found["zeros"] = pieces.check(zeros, (*outer, rows, groups), tensor)
    form = integer_form(8, columns // groups, scales.entry.dtype, has_zeros="zeros" in found)
    head = dict.fromkeys(found, HEAD_ROWS)
    return _stored(tensor.name, tensor.entry.shape, Packing.INTEGERS, found, form, head, 8)


def find_qweight(pieces: Pieces, tensor: CheckpointTensor) -> StoredWeight | None:
    """GPTQ's and AWQ's ``X.qweight``, ``X.qzeros`` and ``X.scales``, inputs before outputs."""
    if not tensor.name.endswith(".qweight") or tensor.entry.dtype != "I32":
        return None
    stem = tensor.name.removesuffix(".qweight")
    scales, zeros = (pieces.need(f"{stem}.{end}") for end in ("scales", "qzeros"))
    if len(tensor.entry.shape) != 2 or len(scales.entry.shape) != 2:
        raise CheckpointError(
            f"{tensor.file} has {tensor.name} in the shape {list(tensor.entry.shape)}, which is "
            "not that of a matrix; download the checkpoint again."
        )
    found = {"packed": tensor, "scales": scales, "zeros": zeros}
    if tensor.entry.shape[1] == scales.entry.shape[1]:
        return _gptq(pieces, f"{stem}.weight", found, pieces.get(f"{stem}.g_idx"))
    return _awq(pieces, f"{stem}.weight", found)


def _gptq(
    pieces: Pieces,
    name: str,
    found: dict[str, CheckpointTensor],
    order: CheckpointTensor | None,
) -> StoredWeight:
    words, columns = found["packed"].entry.shape
    groups = found["scales"].entry.shape[0]
    bits = pieces.description.bits or 4
    if order is not None and order.entry.shape:
        bits = words * WORD_BITS // order.entry.shape[0]
    inputs = words * WORD_BITS // bits
    _check_groups(pieces, found, inputs)
    pieces.check(found["zeros"], (groups, -(-columns * bits // WORD_BITS)), found["packed"])
    form = integer_form(bits, inputs // groups, found["scales"].entry.dtype, has_zeros=True)
    size = inputs // groups
    head = {"packed": max(size * bits // WORD_BITS, 1), "scales": 1, "zeros": 1}
    if order is not None:
        found["order"] = pieces.check(order, (inputs,), found["packed"])
        head["order"] = size
        if pieces.description.is_in_activation_order and groups > 1:
            form = _ACTIVATION_ORDER
            head |= {"scales": groups, "zeros": groups}
    packing = Packing.GPTQ_V2 if pieces.description.is_gptq_v2 else Packing.GPTQ
    return _stored(name, (columns, inputs), packing, found, form, head, bits)


def _awq(pieces: Pieces, name: str, found: dict[str, CheckpointTensor]) -> StoredWeight:
    inputs, words = found["packed"].entry.shape
    groups, columns = found["scales"].entry.shape
    _check_groups(pieces, found, inputs)
    packed = found["packed"]
    pieces.check(packed, (inputs, columns * AWQ_BITS // WORD_BITS), found["scales"])
    pieces.check(found["zeros"], (groups, words), packed)
    size = inputs // groups
    form = integer_form(AWQ_BITS, size, found["scales"].entry.dtype, has_zeros=True)
    head = {"packed": size, "scales": 1, "zeros": 1}
    return _stored(name, (columns, inputs), Packing.AWQ, found, form, head, AWQ_BITS)


def _check_groups(pieces: Pieces, found: dict[str, CheckpointTensor], inputs: int) -> None:
    groups, columns = found["scales"].entry.shape
    if not groups or inputs % groups:
        raise CheckpointError(
            f"{found['scales'].file} has {found['scales'].name} in the shape "
            f"{[groups, columns]}, whose groups do not divide the {inputs} inputs of "
            f"{found['packed'].name}; download the checkpoint again."
        )


_ACTIVATION_ORDER = "its inputs are in groups by activation order (g_idx)"


def _stored(
    name: str,
    shape: tuple[int, ...],
    packing: Packing,
    found: dict[str, CheckpointTensor],
    form: Form | str,
    head: dict[str, int],
    bits: int,
) -> StoredWeight:
    if not 0 < bits <= 8 or not math.prod(shape):
        raise ValueError(f"{name} has {bits} bits and the shape {shape}")
    why_not = form if isinstance(form, str) else ""
    return StoredWeight(
        name,
        shape,
        packing,
        found,
        form if isinstance(form, Form) else None,
        why_not,
        head,
        bits=bits,
    )

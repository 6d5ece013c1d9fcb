"""The bytes of one step: a record, or a tensor of the trunk."""

import torch
from torch import Tensor

from expertd.errors import CheckpointError
from expertd.pack.layout import Encoding, Matrix
from expertd.packing.checkpoint import Checkpoint
from expertd.packing.codec import TORCH_DTYPES, record_parts
from expertd.packing.mxfp4 import Mxfp4Weight
from expertd.packing.plan import ExpertStep, Step, TrunkStep
from expertd.packing.quantizer import quantize


def encode_step(step: Step, checkpoint: Checkpoint, *, optimize: bool) -> bytearray:
    """The bytes that a step writes: a padded record, or a tensor of the trunk.

    Raises :class:`CheckpointError`.
    """
    if isinstance(step, TrunkStep):
        tensor = checkpoint.read(step.source)
        if step.matrix is None:
            return _bytes([tensor.to(TORCH_DTYPES[step.dtype])])
        try:
            return _bytes(list(quantize(tensor, step.matrix, optimize=optimize).values()))
        except ValueError as error:
            raise CheckpointError(f"{step.source.file} cannot be quantized: {error}.") from error
    return _encode_expert(step, checkpoint, optimize=optimize)


def _encode_expert(step: ExpertStep, checkpoint: Checkpoint, *, optimize: bool) -> bytearray:
    tensors = checkpoint.expert(step.module, step.expert)
    record = bytearray(step.layout.record_bytes)
    targets = record_parts(record, step.layout)
    for matrix, weight, bias in (
        (step.layout.matrix("gate_up"), tensors.gate_up, tensors.gate_up_bias),
        (step.layout.matrix("down"), tensors.down, tensors.down_bias),
    ):
        try:
            parts = _parts(weight, matrix, TORCH_DTYPES[checkpoint.dtype], optimize=optimize)
        except ValueError as error:
            raise CheckpointError(
                f"Expert {step.expert} of layer {step.module.layer} cannot be quantized: {error}."
            ) from error
        if bias is not None:
            parts[f"{matrix.name}.bias"] = bias
        for name, values in parts.items():
            targets[name].copy_(values)
    return record


def _parts(
    weight: Tensor | Mxfp4Weight, matrix: Matrix, dtype: torch.dtype, *, optimize: bool
) -> dict[str, Tensor]:
    """The parts of ``matrix`` by name. Raises ValueError if ``weight`` cannot be written so."""
    if isinstance(weight, Mxfp4Weight):
        if matrix.encoding is Encoding.MXFP4:
            return weight.parts(matrix.name)
        weight = weight.dequantize(dtype)
    if matrix.encoding is Encoding.PLAIN:
        return {f"{matrix.name}.weight": weight}
    return quantize(weight, matrix, optimize=optimize)


def _bytes(tensors: list[Tensor]) -> bytearray:
    data = bytearray()
    for tensor in tensors:
        data += tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data

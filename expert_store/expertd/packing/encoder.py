"""The bytes of one step: a record, or a tensor of the trunk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.errors import CheckpointError
from expertd.pack.layout import DTYPE_BYTES, Encoding, Matrix, matrix_parts
from expertd.packing.checkpoint import Checkpoint
from expertd.packing.codec import TORCH_DTYPES, record_parts
from expertd.packing.mxfp4 import Mxfp4Weight
from expertd.packing.plan import ExpertStep, Step, TrunkStep
from expertd.packing.quantizer import quantize_to
from expertd.packing.scratch import Scratch
from expertd.packing.solver import Solver


@dataclass(frozen=True)
class Encoder:
    """Reads and quantizes the steps of a packing."""

    checkpoint: Checkpoint
    solver: Solver
    optimize: bool

    def encode(self, step: Step, scratch: Scratch) -> memoryview:
        """The bytes that a step writes, in ``scratch``: a padded record, or a tensor of the trunk.

        Raises :class:`CheckpointError`.
        """
        encode = self._tensor if isinstance(step, TrunkStep) else self._expert
        return encode(step, scratch).numpy().data  # type: ignore[arg-type]

    def _tensor(self, step: TrunkStep, scratch: Scratch) -> Tensor:
        tensor = self.checkpoint.read(step.source, scratch)
        if step.matrix is None:
            return tensor.to(TORCH_DTYPES[step.dtype]).view(-1).view(torch.uint8)
        pieces = matrix_parts(step.matrix, step.dtype)
        sizes = [math.prod(shape) * DTYPE_BYTES[dtype] for _, shape, dtype in pieces]
        data = scratch.take(sum(sizes))
        parts, offset = {}, 0
        for (name, shape, dtype), num_bytes in zip(pieces, sizes, strict=True):
            piece = data[offset : offset + num_bytes]
            parts[name] = piece.view(TORCH_DTYPES[dtype]).view(shape)
            offset += num_bytes
        self._write(parts, tensor, step.matrix, str(step.source.file))
        return data

    def _expert(self, step: ExpertStep, scratch: Scratch) -> Tensor:
        tensors = self.checkpoint.expert(step.module, step.expert, scratch)
        record = scratch.take(step.layout.record_bytes).zero_()  # what is between parts
        parts = record_parts(record.numpy().data, step.layout)
        for matrix, weight, bias in (
            (step.layout.matrix("gate_up"), tensors.gate_up, tensors.gate_up_bias),
            (step.layout.matrix("down"), tensors.down, tensors.down_bias),
        ):
            what = f"Expert {step.expert} of layer {step.module.layer}"
            self._write(parts, weight, matrix, what)
            if bias is not None:
                parts[f"{matrix.name}.bias"].copy_(bias)
        return record

    def _write(
        self,
        parts: Mapping[str, Tensor],
        weight: Tensor | Mxfp4Weight,
        matrix: Matrix,
        what: str,
    ) -> None:
        """Fills the parts of ``matrix``; ``what`` names it in an error."""
        try:
            if isinstance(weight, Mxfp4Weight):
                if matrix.encoding is Encoding.MXFP4:
                    for name, values in weight.parts(matrix.name).items():
                        parts[name].copy_(values)
                    return
                weight = weight.dequantize(TORCH_DTYPES[self.checkpoint.dtype])
            if matrix.encoding is Encoding.PLAIN:
                parts[f"{matrix.name}.weight"].copy_(weight)
            else:
                quantize_to(parts, weight, matrix, optimize=self.optimize, solver=self.solver)
        except ValueError as error:
            raise CheckpointError(f"{what} cannot be quantized: {error}.") from error

"""The bytes of one step: a record, or a tensor of the trunk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.finite import flaw, flaws
from expertd.packing.plan import ExpertStep, PackingStep, TableStep, TrunkStep
from expertd.packing.quantizer import quantize_to
from expertd.packing.scratch import Scratch
from expertd.packing.solver import Solver
from expertd.packing.stored.matrix import StoredMatrix
from expertstore.errors import CheckpointError
from expertstore.pack.codec import TORCH_DTYPES, record_parts
from expertstore.pack.layout import DOWN, DTYPE_BYTES, Encoding, Matrix
from expertstore.pack.rows import encode_rows
from expertstore.pack.table import CHECKSUM_BYTES, block_checksum


@dataclass(frozen=True)
class Encoded:
    """What a step writes, and what is wrong with the weights that it comes from."""

    data: memoryview
    flaws: tuple[str, ...] = ()
    """Clauses that name the tensors, such as "lm_head.weight holds NaN"."""


@dataclass(frozen=True)
class Encoder:
    """Reads and quantizes the steps of a packing."""

    checkpoint: Checkpoint
    solver: Solver
    optimize: bool

    def encode(self, step: PackingStep, scratch: Scratch) -> Encoded:
        """The bytes that a step writes, in ``scratch``: a record, a tensor, or blocks.

        Raises :class:`CheckpointError`.
        """
        if isinstance(step, TrunkStep):
            data, found = self._tensor(step, scratch)
        elif isinstance(step, TableStep):
            data, found = self._rows(step, scratch)
        else:
            data, found = self._expert(step, scratch)
        return Encoded(data.numpy().data, tuple(found))

    def _tensor(self, step: TrunkStep, scratch: Scratch) -> tuple[Tensor, list[str]]:
        if step.matrix is None:
            tensor = self.checkpoint.read(step.source, scratch)
            dtype = TORCH_DTYPES[step.dtype]
            used = dtype if step.stays_wide else TORCH_DTYPES[self.checkpoint.dtype]
            data = tensor.to(dtype).view(-1).view(torch.uint8)
            is_bad = bool(flaw(tensor, used))
            return data, self._trunk_flaws(step, used) if is_bad else []
        pieces = step.pieces()
        sizes = [math.prod(shape) * DTYPE_BYTES[dtype] for _, shape, dtype in pieces]
        data = scratch.take(sum(sizes))
        parts, offset = {}, 0
        for (name, shape, kind), num_bytes in zip(pieces, sizes, strict=True):
            piece = data[offset : offset + num_bytes]
            parts[name] = piece.view(TORCH_DTYPES[kind]).view(shape)
            offset += num_bytes
        weight = self.checkpoint.read_stored(step.source, scratch)
        if not self._write(parts, weight, step.matrix):
            return data, []
        found = self._trunk_flaws(step, torch.float32)
        if not found and isinstance(weight, Tensor):
            option = "--attention, --dense or --head"
            found = self._refuse(step.source.name, weight, step.matrix, option)
        return data, found

    def _trunk_flaws(self, step: TrunkStep, dtype: torch.dtype) -> list[str]:
        found = flaws(self.checkpoint.trunk_pieces(step.source), dtype)
        if not found and self.checkpoint.is_stored(step.source):
            return [f"{step.source.name} times its scales is more than a number holds"]
        return found

    def _rows(self, step: TableStep, scratch: Scratch) -> tuple[Tensor, list[str]]:
        table = step.table
        pieces = [
            (source, self.checkpoint.read_rows(source, begin, num_rows, scratch))
            for source, begin, num_rows in step.sources
        ]
        values = pieces[0][1] if len(pieces) == 1 else torch.cat([values for _, values in pieces])
        rows = encode_rows(values, table.encoding, table.dtype)
        data = scratch.take(step.num_blocks * table.block_bytes).zero_()
        blocks = data.view(step.num_blocks, table.block_bytes)
        used = table.rows_per_block * table.row_bytes
        whole, rest = divmod(step.num_rows, table.rows_per_block)
        blocks[:whole, :used] = rows[: whole * table.rows_per_block].view(whole, used)
        if rest:
            blocks[whole, : rest * table.row_bytes] = rows[-rest:].reshape(-1)
        for index, block in enumerate(blocks.numpy()):
            view = block.data
            checksum = block_checksum(view, step.first_block + index)
            view[-CHECKSUM_BYTES:] = checksum.to_bytes(CHECKSUM_BYTES, "little")
        dtype = TORCH_DTYPES[table.dtype]
        if not flaw(values, dtype):
            return data, []
        return data, [
            f"{source.name} holds {what}"
            for source, values in pieces
            if (what := flaw(values, dtype))
        ]

    def _expert(self, step: ExpertStep, scratch: Scratch) -> tuple[Tensor, list[str]]:
        tensors = self.checkpoint.expert(step.module, step.expert, scratch)
        record = scratch.take(step.layout.record_bytes).zero_()  # what is between parts
        parts = record_parts(record.numpy().data, step.layout)
        dtype = TORCH_DTYPES[self.checkpoint.dtype]
        found: list[str] = []
        for matrix, weight, bias in (
            (step.layout.inward, tensors.gate_up, tensors.gate_up_bias),
            (step.layout.matrix(DOWN), tensors.down, tensors.down_bias),
        ):
            is_bad = self._write(parts, weight, matrix)
            if bias is not None:
                parts[f"{matrix.name}.bias"].copy_(bias)
                is_bad |= bool(flaw(bias, dtype))
            if is_bad and not found:
                found = self._expert_flaws(step, matrix, weight)
        return record, found

    def _expert_flaws(
        self, step: ExpertStep, matrix: Matrix, weight: Tensor | StoredMatrix
    ) -> list[str]:
        pieces = list(self.checkpoint.pieces(step.module, step.expert))
        dtype = TORCH_DTYPES[self.checkpoint.dtype]
        # Of quantized weights only what is no number is lost, but biases are not quantized.
        of_weights = dtype if matrix.encoding is Encoding.PLAIN else torch.float32
        found = [
            clause
            for piece in pieces
            for clause in flaws(
                [piece], dtype if "bias" in piece[0].name else of_weights, step.expert
            )
        ]
        where = f"Expert {step.expert} of layer {step.module.layer}"
        if found:
            return found
        if isinstance(weight, Tensor) and bool(torch.isfinite(weight).all()):
            return self._refuse(where, weight, matrix, "--experts")
        return [f"{where} times its scales is more than a number holds"]

    def _write(
        self, parts: Mapping[str, Tensor], weight: Tensor | StoredMatrix, matrix: Matrix
    ) -> bool:
        """Fills the parts of ``matrix``; whether something in it is not a number then."""
        if isinstance(weight, StoredMatrix):
            if _is_of(weight, matrix, parts):
                for name, values in weight.parts(matrix.name).items():
                    parts[name].copy_(values)
                return not weight.is_finite
            weight = weight.dequantize(torch.float32)
        if matrix.encoding is Encoding.PLAIN:
            part = parts[f"{matrix.name}.weight"]
            part.copy_(weight)
            return bool(flaw(weight, part.dtype))
        return self._quantize(parts, weight, matrix)

    def _quantize(self, parts: Mapping[str, Tensor], weight: Tensor, matrix: Matrix) -> bool:
        return bool(quantize_to(parts, weight, matrix, optimize=self.optimize, solver=self.solver))

    @staticmethod
    def _refuse(what: str, weight: Tensor, matrix: Matrix, option: str) -> list[str]:
        raise CheckpointError(
            f"{what} cannot be written in {matrix.bits} bits: its weights reach "
            f"{weight.abs().max():.3g}, far more than others like it, and scales in fp16 end at "
            f"65504; give {option} 16 to keep such weights in 16 bits."
        )


def _is_of(weight: StoredMatrix, matrix: Matrix, parts: Mapping[str, Tensor]) -> bool:
    """Whether the record holds the matrix in the very form in which it is stored."""
    return weight.matrix(matrix.name) == matrix and all(
        parts[f"{matrix.name}.{end}"].dtype == values.dtype for end, values in weight.values.items()
    )

"""A checkpoint in Hugging Face's form, read one expert at a time.

Where an expert's weights are, and what has to be done with them, is what transformers itself
would do when it loads the model: its conversion mapping (``transformers.conversion_mapping``,
internal; the range of versions in pyproject is the tested one) names the checkpoint's tensors
of each fused parameter and the operations from one to the other. These are applied to one
expert's slice. So per-expert tensors (Mixtral's w1, w2, w3), fused ones (GPT-OSS, GraniteMoE)
and renamed modules need no code here. What comes in MXFP4 (:mod:`expertd.packing.mxfp4`) is read
as it is, what comes in FP8 (:mod:`expertd.packing.fp8`) as the 16-bit weights that it stands for.
"""

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from expertd.packing import fp8
from expertd.packing.architecture import Architecture, ExpertsModule, read_architecture
from expertd.packing.checkpoint_files import (
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    CheckpointTensor,
    find_tensors,
    fingerprint,
    quantization_method,
    read_config,
)
from expertd.packing.mxfp4 import BITS_PER_WEIGHT, Mxfp4Weight
from expertd.packing.quantizer import scale_type
from expertd.packing.scratch import Scratch
from expertd.packing.shards import Shards
from expertd.packing.sorting import Sorter
from expertstore.errors import CheckpointError
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.manifest import GateOrder
from expertstore.pack.tensor_file import read_into

SAMPLE_BYTES = 64 << 10
"""Read of a tensor to see how large its weights are."""


@dataclass(frozen=True)
class ExpertTensors:
    """One expert in the order of a record: gate rows before up rows, [out, in]."""

    gate_up: Tensor | Mxfp4Weight  # [2I, H]
    down: Tensor | Mxfp4Weight  # [H, I]
    gate_up_bias: Tensor | None  # [2I]
    down_bias: Tensor | None  # [H]


class Checkpoint:
    """An open checkpoint. Close it, or use it as a context manager; threads may read from it.

    What is read lies in the :class:`Scratch` given, or in new memory.
    """

    def __init__(self, path: Path, shards: Shards | None = None) -> None:
        """Reads the configuration and all headers. Raises :class:`CheckpointError`.

        ``shards``: its files are here only for a time; what is read of others is asked of these.
        """
        self.path = path
        self._shards = shards
        config = read_config(path)
        self.architecture: Architecture = read_architecture(path)
        listing = find_tensors(path, config)
        self.fingerprint = shards.fingerprint if shards else fingerprint(path, listing.tensors)
        self._fds: dict[Path, int] = {}
        self._opening = Lock()
        self._scales = fp8.find_scales(path, listing.tensors, self.architecture.fp8_block)
        scales = {scale.name for scale in self._scales.values()}
        tensors = [tensor for tensor in listing.tensors if tensor.name not in scales]
        sorter = Sorter(path, config, self.architecture, set(self._scales))
        found = sorter.sort(replace(listing, tensors=tensors), self._convert)
        self._parameters = found.experts
        self.trunk = found.trunk
        """All but the experts, each with the model's own name of the parameter it fills: one that
        is made of several or split into several comes with an empty name."""
        self.unused = found.unused
        """Tensors that the architecture has no place for; transformers ignores them too."""
        self.unfilled = found.unfilled
        """Buffers of the model that the checkpoint lacks; transformers makes them up too."""
        self.types = self._types()
        self.is_float32 = not self.types & {"BF16", "F16"}
        self.dtype = "F16" if self._holds_all() else "BF16"
        """Of the model's 16-bit weights, in safetensors' names: the one that has the range of all
        types that its tensors come in; float32 becomes BF16."""
        self.is_mxfp4 = any(parameter.is_mxfp4 for parameter in self._parameters.values())
        self.disagrees = "" if self.is_mxfp4 or self._scales else quantization_method(config)
        """The method by which config.json has the checkpoint quantized, though it is not."""
        self.expert_bits = BITS_PER_WEIGHT if self.is_mxfp4 else 16.0
        if self._scales:
            self.expert_bits = 8.0
        """Size of an expert's weights in the checkpoint, about: one in float32 is twice that."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files; twice is harmless."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def drop(self, file: Path) -> None:
        """Closes a file of which nothing is left to read, and says so to its :class:`Shards`."""
        fd = self._fds.pop(file, None)
        if fd is not None:
            os.close(fd)
        if self._shards is not None:
            self._shards.drop(file)

    def expert_files(self, module: ExpertsModule, expert: int) -> set[Path]:
        """The files that hold something of the expert."""
        return {tensor.file for tensor, _ in self._tensors_of(module, expert)}

    def trunk_files(self, source: CheckpointTensor) -> set[Path]:
        """The files that hold a tensor of the trunk, and its scales."""
        return {each.file for each in (source, self._scales.get(source.name)) if each is not None}

    def read(self, tensor: CheckpointTensor, scratch: Scratch | None = None) -> Tensor:
        """The whole tensor, of type :meth:`type_of`. Raises :class:`CheckpointError`."""
        buffer = (scratch or Scratch()).take(tensor.entry.num_bytes)
        values = self._read_slice(tensor, 0, buffer).view(tensor.entry.shape)
        scale = self._scales.get(tensor.name)
        return values if scale is None else self._dequantize(values, self.read(scale))

    def type_of(self, tensor: CheckpointTensor) -> str:
        """As what the tensor is read, in safetensors' names: FP8 as 16-bit weights."""
        return self.dtype if tensor.name in self._scales else tensor.entry.dtype

    def expert(
        self, module: ExpertsModule, expert: int, scratch: Scratch | None = None
    ) -> ExpertTensors:
        """One expert's weights in the type that they come in; of several types, in the widest.

        Raises :class:`CheckpointError`.
        """
        scratch = scratch or Scratch()
        biases: list[Tensor | None] = [None, None]
        if module.has_bias:
            interleaved = module.gate_order is GateOrder.INTERLEAVED
            gate_up, down = (
                self._slice_parameter(module.parameter(f"{leaf}_proj_bias"), expert, scratch)
                for leaf in ("gate_up", "down")
            )
            biases = [_gate_rows_first(gate_up) if interleaved else gate_up, down]
        return ExpertTensors(
            self._weight(module, "gate_up_proj", expert, scratch),
            self._weight(module, "down_proj", expert, scratch),
            *biases,
        )

    def _weight(
        self, module: ExpertsModule, leaf: str, expert: int, scratch: Scratch
    ) -> Tensor | Mxfp4Weight:
        """The expert's matrix [out, in], gate rows first."""
        name = module.parameter(leaf)
        interleaved = leaf == "gate_up_proj" and module.gate_order is GateOrder.INTERLEAVED
        order = _gate_rows_first if interleaved else Tensor.contiguous
        parameter = self._parameters[name]
        if parameter.is_mxfp4:
            blocks, scales = (
                self._slice_fused(parameter.sources[end][0], expert, scratch)
                for end in (MXFP4_BLOCKS, MXFP4_SCALES)
            )
            return Mxfp4Weight.from_blocks(order(blocks), order(scales))
        weight = self._slice_parameter(name, expert, scratch)
        return order(weight.T if module.is_transposed else weight)

    def scale_type(self, module: ExpertsModule, leaf: str, bits: int) -> str:
        """In which type the scales of the experts' matrix ``leaf`` are to be stored in ``bits``.

        By a sample, from which an expert may differ by some powers of two.
        """
        parameter = self._parameters[module.parameter(leaf)]
        last = module.num_experts - 1
        if parameter.is_mxfp4:
            weight = self._weight(module, leaf, last // 2, Scratch())
            assert isinstance(weight, Mxfp4Weight)
            return scale_type(_largest(weight.dequantize(torch.float32)), bits)
        experts = {0, last // 2, last}
        samples = [
            [self._sample(*piece, expert) for piece in parameter.of_expert(expert)]
            for expert in experts
        ]
        # Gate and up are of one matrix, and need not be of one size.
        medians = [sorted(of_piece)[len(experts) // 2] for of_piece in zip(*samples, strict=True)]
        is_unusual = any(scale_type(median, bits) != "F16" for median in medians)
        return "BF16" if is_unusual else "F16"

    def trunk_scale_type(self, tensor: CheckpointTensor, bits: int) -> str:
        """The same for a matrix of the trunk."""
        return scale_type(self._sample(tensor, False, 0), bits)

    def _sample(self, tensor: CheckpointTensor, is_fused: bool, expert: int) -> float:
        """The largest of the first weights of a tensor, or of an expert's in it."""
        num_bytes = tensor.entry.num_bytes // (tensor.entry.shape[0] if is_fused else 1)
        begin = expert * num_bytes * is_fused
        scale = self._scales.get(tensor.name)
        if scale is None:
            buffer = Scratch().take(min(num_bytes, SAMPLE_BYTES))
            return _largest(self._read_slice(tensor, begin, buffer))
        block = self.architecture.fp8_block
        assert block is not None, "scales are looked for where there are blocks"
        num_rows, width = min(block[0], tensor.entry.shape[-2]), tensor.entry.shape[-1]
        values = self._read_slice(tensor, begin, Scratch().take(num_rows * width))
        scales_bytes = scale.entry.num_bytes // (scale.entry.shape[0] if is_fused else 1)
        row = Scratch().take(scales_bytes // scale.entry.shape[-2])
        scales = self._read_slice(scale, expert * scales_bytes * is_fused, row)
        return _largest(
            fp8.dequantize(values.view(num_rows, width), scales[None], block, torch.float32)
        )

    def has_mxfp4(self, module: ExpertsModule) -> bool:
        """Whether both matrices of the module's experts come in MXFP4."""
        return all(self._parameters[name].is_mxfp4 for name in module.parameters()[:2])

    def pieces(
        self, module: ExpertsModule, expert: int
    ) -> Iterator[tuple[CheckpointTensor, Tensor]]:
        """Each tensor that holds something of the expert, and what of it is the expert's.

        As the files have it: blocks, FP8 and the scales of these are tensors of their own.
        """
        for each, is_fused in self._tensors_of(module, expert):
            num_bytes = each.entry.num_bytes // (each.entry.shape[0] if is_fused else 1)
            buffer = Scratch().take(num_bytes)
            yield each, self._read_slice(each, expert * num_bytes * is_fused, buffer)

    def _tensors_of(
        self, module: ExpertsModule, expert: int
    ) -> Iterator[tuple[CheckpointTensor, bool]]:
        """Each tensor that holds something of the expert, and whether of all others as well."""
        for name in module.parameters():
            for source, is_fused in self._parameters[name].of_expert(expert):
                for each in (source, self._scales.get(source.name)):
                    if each is not None:
                        yield each, is_fused

    def is_scaled(self, tensor: CheckpointTensor) -> bool:
        """Whether it is in FP8, and read as what it is with its scales."""
        return tensor.name in self._scales

    def trunk_pieces(self, source: CheckpointTensor) -> Iterator[tuple[CheckpointTensor, Tensor]]:
        """A tensor of the trunk, and that of its scales, as the files have them."""
        for each in (source, self._scales.get(source.name)):
            if each is not None:
                yield each, self._read_slice(each, 0, Scratch().take(each.entry.num_bytes))

    def _types(self) -> set[str]:
        """Of the experts' weights and biases, in safetensors' names; what is FP8 counts as BF16."""
        return {
            "BF16" if source.name in self._scales else source.entry.dtype
            for parameter in self._parameters.values()
            if not parameter.is_mxfp4
            for sources in parameter.sources.values()
            for source in sources
        } or {"BF16"}

    def _holds_all(self) -> bool:
        """Whether F16 has the range of all 16-bit tensors, and of the experts' others."""
        trunk = {source.entry.dtype for _, source in self.trunk}
        return self.types == {"F16"} and "BF16" not in trunk and not self._scales

    def _dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """A weight in FP8 as what it stands for; of all experts, or of one."""
        block = self.architecture.fp8_block
        assert block is not None, "scales are looked for where there are blocks"
        dtype = TORCH_DTYPES[self.dtype]
        if values.dim() == 2:
            return fp8.dequantize(values, scales, block, dtype)
        pairs = zip(values, scales, strict=True)
        return torch.stack([fp8.dequantize(*pair, block, dtype) for pair in pairs])

    def _slice_parameter(self, name: str, expert: int, scratch: Scratch) -> Tensor:
        """The expert's slice of the module's parameter."""
        parameter = self._parameters[name]
        pieces = parameter.stacked(expert)
        if parameter.converter is None:
            result = self._slice_fused(parameter.sources[""][0], expert, scratch)[None]
        elif pieces:
            result = self._read_stacked(pieces, scratch)[None]
        else:
            slices: dict[str, list[Tensor]] = {}
            for pattern, sources in parameter.sources.items():
                if parameter.is_fused(pattern):
                    slices[pattern] = [self._slice_fused(sources[0], expert, scratch)[None]]
                else:
                    slices[pattern] = [self.read(sources[expert], scratch)]
            result = self._convert(parameter.converter, name, slices)
        return result[0]

    def _slice_fused(self, tensor: CheckpointTensor, expert: int, scratch: Scratch) -> Tensor:
        """One expert's piece of a tensor of all experts, in the tensor's dtype."""
        shape = tensor.entry.shape
        num_bytes = tensor.entry.num_bytes // shape[0]
        buffer = scratch.take(num_bytes)
        values = self._read_slice(tensor, expert * num_bytes, buffer).view(shape[1:])
        scale = self._scales.get(tensor.name)
        if scale is None:
            return values
        return self._dequantize(values, self._slice_fused(scale, expert, scratch))

    def _read_stacked(self, pieces: Sequence[CheckpointTensor], scratch: Scratch) -> Tensor:
        """Matrices of equal width and type, one below the other."""
        if pieces[0].name in self._scales:
            return torch.cat([self.read(piece, scratch) for piece in pieces])
        buffer = scratch.take(sum(piece.entry.num_bytes for piece in pieces))
        end = 0
        for piece in pieces:
            begin, end = end, end + piece.entry.num_bytes
            self._read_slice(piece, 0, buffer[begin:end])
        dtype = TORCH_DTYPES[pieces[0].entry.dtype]
        return buffer.view(dtype).view(-1, pieces[0].entry.shape[1])

    def _convert(
        self, converter: WeightConverter, name: str, slices: dict[str, list[Tensor]]
    ) -> Tensor:
        """Applies transformers' operations to what they take for a model with one expert."""
        converter = deepcopy(converter)
        for pattern, tensors in slices.items():
            for tensor in tensors:
                converter.add_tensor(name, name, pattern, tensor)
        config = self.architecture.model.config
        results: dict[str, Any] = converter.convert(
            name, model=self.architecture.model, config=config
        )
        result = results[name]
        fused: Tensor = result[0] if isinstance(result, list) else result
        return fused

    def _read_slice(self, tensor: CheckpointTensor, begin: int, buffer: Tensor) -> Tensor:
        """``buffer`` (uint8), filled from the tensor's byte ``begin``, in its dtype."""
        dtype = TORCH_DTYPES.get(tensor.entry.dtype)
        if tensor.name in self._scales:
            dtype = fp8.TORCH_DTYPE
        if dtype is None:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} has the type {tensor.entry.dtype}, which cannot "
                "be packed yet; pack a checkpoint in 16 or 32 bits."
            )
        if self._shards is not None and not self._shards.is_here(tensor.file):
            data = self._shards.read(tensor.file, tensor.entry.offset + begin, buffer.numel())
            buffer.numpy()[:] = np.frombuffer(data, np.uint8)
            return buffer.view(dtype)
        try:
            with self._opening:
                if tensor.file not in self._fds:
                    self._fds[tensor.file] = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
            view = buffer.numpy().data
            read_into(self._fds[tensor.file], view, tensor.entry.offset + begin)
        except EOFError as error:
            raise CheckpointError(
                f"{tensor.file} is truncated: {tensor.name} lies past its end; download it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error.strerror}.") from error
        return buffer.view(dtype)


def _largest(values: Tensor) -> float:
    return float(values.float().abs().max()) if values.numel() else 0.0


def _gate_rows_first(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up ... become all gate rows, then all up rows."""
    return torch.cat((rows[0::2], rows[1::2]))

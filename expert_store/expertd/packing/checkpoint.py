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
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from expertd.errors import CheckpointError
from expertd.pack.layout import MXFP4_GROUP_SIZE
from expertd.pack.manifest import GateOrder
from expertd.pack.tensor_file import read_into
from expertd.packing import fp8
from expertd.packing.architecture import Architecture, ExpertsModule, read_architecture
from expertd.packing.codec import TORCH_DTYPES
from expertd.packing.mxfp4 import BITS_PER_WEIGHT, BLOCKS, SCALES, Mxfp4Weight
from expertd.packing.scratch import Scratch
from expertd.packing.source import SourceTensor, find_tensors, fingerprint


@dataclass(frozen=True)
class ExpertTensors:
    """One expert in the order of a record: gate rows before up rows, [out, in]."""

    gate_up: Tensor | Mxfp4Weight  # [2I, H]
    down: Tensor | Mxfp4Weight  # [H, I]
    gate_up_bias: Tensor | None  # [2I]
    down_bias: Tensor | None  # [H]


@dataclass
class _Parameter:
    """What one fused parameter of an experts module is made of."""

    name: str
    shape: tuple[int, ...]
    """[num_experts, ...], as the model has it."""
    converter: WeightConverter | None = None
    sources: dict[str, list[SourceTensor]] = field(default_factory=dict)
    """By the converter's source pattern; in the experts' order, or one tensor of all. Of what is
    MXFP4, by the ends of the tensors' names."""

    @property
    def is_mxfp4(self) -> bool:
        """Whether it comes as blocks and scales."""
        return BLOCKS in self.sources

    def is_fused(self, pattern: str) -> bool:
        """Whether the checkpoint has one tensor of all experts."""
        sources = self.sources.get(pattern, [])
        return len(sources) == 1 and len(sources[0].entry.shape) == len(self.shape)

    def stacked(self, expert: int) -> list[SourceTensor]:
        """The matrices that, one below the other, are the expert's; none if more is to be done.

        That is Mixtral's conversion and most others': experts are stacked, and then gate and up
        are concatenated. transformers' operations would copy what can be read in place.
        """
        if self.converter is None or len(self.shape) != 3:
            return []
        merge, *concatenate = self.converter.operations
        plain = isinstance(merge, MergeModulelist) and merge.dim == 0
        if concatenate:
            (then,) = concatenate[:1]
            plain &= isinstance(then, Concatenate) and then.dim == 1 and not concatenate[1:]
        patterns = self.converter.source_patterns
        if not plain or any(self.is_fused(pattern) for pattern in patterns):
            return []
        pieces = [self.sources[pattern][expert] for pattern in patterns]
        kinds = {(piece.entry.dtype, piece.entry.shape[1:]) for piece in pieces}
        return pieces if len(kinds) == 1 and len(pieces[0].entry.shape) == 2 else []


class Checkpoint:
    """An open checkpoint. Close it, or use it as a context manager; threads may read from it.

    What is read lies in the :class:`Scratch` given, or in new memory.
    """

    def __init__(self, path: Path) -> None:
        """Reads the configuration and all headers. Raises :class:`CheckpointError`."""
        self.path = path
        self.architecture: Architecture = read_architecture(path)
        tensors = find_tensors(path)
        self.fingerprint = fingerprint(path, tensors)
        self._fds: dict[Path, int] = {}
        self._opening = Lock()
        self._parameters: dict[str, _Parameter] = {}
        self.trunk: list[tuple[str, SourceTensor]] = []
        """The other tensors, each with the model's own name of the parameter it fills: one that
        is made of several or split into several comes with an empty name."""
        self.unused: list[str] = []
        """Tensors that the architecture has no place for; transformers ignores them too."""
        self._scales = self._find_scales(tensors)
        scales = {scale.name for scale in self._scales.values()}
        self._sort([tensor for tensor in tensors if tensor.name not in scales])
        for module in self.architecture.experts:
            self._check(module)
        source_dtype = self._source_dtype()
        self.is_float32 = source_dtype not in {"BF16", "F16"}
        self.dtype = "BF16" if self.is_float32 else source_dtype
        """Of the model's 16-bit weights, in safetensors' names; float32 becomes BF16."""
        self.expert_bits = BITS_PER_WEIGHT if self.architecture.is_mxfp4 else 16.0
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

    def read(self, tensor: SourceTensor, scratch: Scratch | None = None) -> Tensor:
        """The whole tensor, of type :meth:`type_of`. Raises :class:`CheckpointError`."""
        buffer = (scratch or Scratch()).take(tensor.entry.num_bytes)
        values = self._read_slice(tensor, 0, buffer).view(tensor.entry.shape)
        scale = self._scales.get(tensor.name)
        return values if scale is None else self._dequantize(values, self.read(scale))

    def type_of(self, tensor: SourceTensor) -> str:
        """As what the tensor is read, in safetensors' names: FP8 as 16-bit weights."""
        return self.dtype if tensor.name in self._scales else tensor.entry.dtype

    def expert(
        self, module: ExpertsModule, expert: int, scratch: Scratch | None = None
    ) -> ExpertTensors:
        """One expert's weights in :attr:`dtype`, or as MXFP4 if that is what they are.

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
                for end in (BLOCKS, SCALES)
            )
            return Mxfp4Weight.from_blocks(order(blocks), order(scales))
        weight = self._slice_parameter(name, expert, scratch)
        return order(weight.T if module.is_transposed else weight)

    def _source_dtype(self) -> str:
        """The type of the experts' weights, or of their biases where they are MXFP4."""
        first = self.architecture.experts[0]
        names = first.parameters()
        if self._parameters[names[0]].is_mxfp4:
            if not first.has_bias:
                return "BF16"
            names = names[2:]
        source = next(iter(self._parameters[names[0]].sources.values()))[0]
        return "BF16" if source.name in self._scales else source.entry.dtype

    def _find_scales(self, tensors: Sequence[SourceTensor]) -> dict[str, SourceTensor]:
        """By the name of each tensor in FP8, the tensor of its scales."""
        block = self.architecture.fp8_block
        if block is None:
            return {}
        by_name = {tensor.name: tensor for tensor in tensors}
        scales = {}
        for tensor in tensors:
            if tensor.entry.dtype != fp8.DTYPE:
                continue
            scale = by_name.get(f"{tensor.name}{fp8.SCALE}")
            if scale is None:
                raise CheckpointError(
                    f"{self.path} lacks {tensor.name}{fp8.SCALE}; download the checkpoint again."
                )
            _check_shape(scale, fp8.num_blocks(tensor.entry.shape, block))
            scales[tensor.name] = scale
        return scales

    def _dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """A weight in FP8 as what it stands for; of all experts, or of one."""
        block = self.architecture.fp8_block
        assert block is not None, "scales are looked for where there are blocks"
        dtype = TORCH_DTYPES[self.dtype]
        if values.dim() == 2:
            return fp8.dequantize(values, scales, block, dtype)
        pairs = zip(values, scales, strict=True)
        return torch.stack([fp8.dequantize(*pair, block, dtype) for pair in pairs])

    def _sort(self, tensors: Sequence[SourceTensor]) -> None:
        """Finds for each tensor the parameter that it belongs to."""
        model = self.architecture.model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state = model.state_dict()
        experts = {name for module in self.architecture.experts for name in module.parameters()}
        filled: set[str] = set()
        # In transformers' own order, which its lazily activated renamings depend on.
        for tensor in sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)):
            prefix = model.base_model_prefix
            stem, end = tensor.name, ""
            if self.architecture.is_mxfp4:
                stem, end = _split_end(stem)
            name, pattern = rename_source_key(stem, renamings, converters, prefix, state)
            if name not in state and stem in state:
                name, pattern = rename_source_key(stem, [], [], prefix, state)
            if name in experts:
                parameter = self._parameters.setdefault(
                    name, _Parameter(name, tuple(state[name].shape))
                )
                parameter.converter = by_pattern[pattern] if pattern else None
                parameter.sources.setdefault(end or pattern or "", []).append(tensor)
            elif name in state and not end:
                if not pattern:
                    _check_shape(tensor, tuple(state[name].shape))
                self.trunk.append(("" if pattern else name, tensor))
                filled |= _targets(name, by_pattern[pattern]) if pattern else {name}
            else:
                self.unused.append(tensor.name)
        missing = self.architecture.required_parameters() - filled - experts
        if missing:
            raise CheckpointError(
                f"{self.path} lacks the weights of {min(missing)} (and of {len(missing) - 1} "
                "more parameters); download the checkpoint again."
            )
        self.trunk.sort(key=lambda item: item[1].name)

    def _check(self, module: ExpertsModule) -> None:
        """Raises :class:`CheckpointError` unless every expert of ``module`` is complete."""
        for name in module.parameters():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise CheckpointError(
                    f"{self.path} lacks the weights of {name}; download the checkpoint again."
                )
            if self.architecture.is_mxfp4 and not name.endswith("_bias"):
                self._check_mxfp4(parameter, module)
                continue
            patterns = parameter.converter.source_patterns if parameter.converter else [""]
            for pattern in patterns:
                sources = parameter.sources.get(pattern, [])
                if parameter.is_fused(pattern):
                    _check_shape(sources[0], (module.num_experts, *sources[0].entry.shape[1:]))
                else:
                    _check_each_expert(self.path, sources, module, pattern)

    def _check_mxfp4(self, parameter: _Parameter, module: ExpertsModule) -> None:
        rows, columns = parameter.shape[1:]
        if module.is_transposed:  # the parameter, not its blocks
            rows, columns = columns, rows
        groups = (module.num_experts, rows, columns // MXFP4_GROUP_SIZE)
        for end, shape in ((BLOCKS, (*groups, MXFP4_GROUP_SIZE // 2)), (SCALES, groups)):
            sources = parameter.sources.get(end)
            if not sources:
                raise CheckpointError(
                    f"{self.path} lacks {parameter.name}{end}; download the checkpoint again."
                )
            _check_shape(sources[0], shape)

    def _slice_parameter(self, name: str, expert: int, scratch: Scratch) -> Tensor:
        """The expert's slice of the module's parameter, in :attr:`dtype`."""
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
        if result[0].shape != parameter.shape[1:]:
            raise CheckpointError(
                f"{self.path} has {name} of expert {expert} in the shape {list(result[0].shape)}, "
                f"and its config.json asks for {list(parameter.shape[1:])}; download it again."
            )
        return result[0].to(TORCH_DTYPES[self.dtype])

    def _slice_fused(self, tensor: SourceTensor, expert: int, scratch: Scratch) -> Tensor:
        """One expert's piece of a tensor of all experts, in the tensor's dtype."""
        shape = tensor.entry.shape
        num_bytes = tensor.entry.num_bytes // shape[0]
        buffer = scratch.take(num_bytes)
        values = self._read_slice(tensor, expert * num_bytes, buffer).view(shape[1:])
        scale = self._scales.get(tensor.name)
        if scale is None:
            return values
        return self._dequantize(values, self._slice_fused(scale, expert, scratch))

    def _read_stacked(self, pieces: Sequence[SourceTensor], scratch: Scratch) -> Tensor:
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

    def _read_slice(self, tensor: SourceTensor, begin: int, buffer: Tensor) -> Tensor:
        """``buffer`` (uint8), filled from the tensor's byte ``begin``, in its dtype."""
        dtype = TORCH_DTYPES.get(tensor.entry.dtype)
        if tensor.name in self._scales:
            dtype = fp8.TORCH_DTYPE
        if dtype is None:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} has the type {tensor.entry.dtype}, which cannot "
                "be packed yet; pack a checkpoint in 16 or 32 bits."
            )
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


def _gate_rows_first(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up ... become all gate rows, then all up rows."""
    return torch.cat((rows[0::2], rows[1::2]))


def _split_end(name: str) -> tuple[str, str]:
    """A tensor's name without the end that tells MXFP4's blocks from its scales, and that end."""
    for end in (BLOCKS, SCALES):
        if name.endswith(end):
            return name.removesuffix(end), end
    return name, ""


def _targets(name: str, converter: WeightConverter) -> set[str]:
    """The parameters that a converter fills, given the first of them."""
    first = converter.target_patterns[0]
    return {name.replace(first, target) for target in converter.target_patterns}


def _check_shape(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.entry.shape != shape:
        raise CheckpointError(
            f"{tensor.file} has {tensor.name} in the shape {list(tensor.entry.shape)}, and its "
            f"config.json asks for {list(shape)}; download the checkpoint again."
        )


def _check_each_expert(
    path: Path, sources: list[SourceTensor], module: ExpertsModule, pattern: str
) -> None:
    found = {}
    for source in sources:
        numbers = re.findall(r"\.(\d+)(?=\.)", source.name)  # layer, then expert
        found[int(numbers[-1]) if numbers else -1] = source
    missing = [expert for expert in range(module.num_experts) if expert not in found]
    if missing:
        raise CheckpointError(
            f"{path} lacks {pattern.replace('*', str(missing[0])).lstrip('.')} of layer "
            f"{module.layer}: it has that tensor for {len(found)} of {module.num_experts} "
            "experts; download the checkpoint again."
        )

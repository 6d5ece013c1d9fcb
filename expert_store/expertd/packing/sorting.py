"""Which parameter of the model each tensor of a checkpoint belongs to, as transformers has it.

All that headers can tell is found here, before any weight is read: what is missing, what is too
many, what has another shape or a type that is none of weights.
"""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from expertd.packing.architecture import Architecture, ExpertsModule
from expertd.packing.checkpoint_files import CheckpointTensor, Listing, check_shape
from expertd.packing.foreign import FLOATS, find_format, is_evident, quantized_error, type_error
from expertstore.errors import CheckpointError
from expertstore.pack.layout import DTYPE_BYTES


@dataclass
class Parameter:
    """What one fused parameter of an experts module is made of."""

    name: str
    shape: tuple[int, ...]
    """[num_experts, ...], as the model has it."""
    converter: WeightConverter | None = None
    sources: dict[str, list[CheckpointTensor]] = field(default_factory=dict)
    """By the converter's source pattern; in the experts' order, or one tensor of all."""

    def is_fused(self, pattern: str) -> bool:
        """Whether the checkpoint has one tensor of all experts."""
        sources = self.sources.get(pattern, [])
        return len(sources) == 1 and len(sources[0].entry.shape) == len(self.shape)

    def of_expert(self, expert: int) -> list[tuple[CheckpointTensor, bool]]:
        """The tensors that the expert is made of, and whether each is one of all experts."""
        return [
            (sources[0], True)
            if self.converter is None or self.is_fused(pattern)
            else (sources[expert], False)
            for pattern, sources in self.sources.items()
        ]

    def stacked(self, expert: int) -> list[CheckpointTensor]:
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


Convert = Callable[[WeightConverter, str, dict[str, list[Tensor]]], Tensor]
"""Applies a converter to what it takes for a model with one expert, for the parameter named."""


@dataclass(frozen=True)
class Sorted:
    """The tensors of a checkpoint, each where it belongs."""

    experts: dict[str, Parameter]
    """By the model's name of the parameter."""
    trunk: list[tuple[str, CheckpointTensor]]
    """Each with the model's own name of the parameter it fills: one that is made of several or
    split into several comes with an empty name."""
    unused: list[str]
    """Tensors that the architecture has no place for; transformers ignores them too."""
    unfilled: list[str]
    """Buffers that keep what the model makes of them."""
    tables: dict[str, list[CheckpointTensor]] = field(default_factory=dict)
    """By the model's name of the parameter: the tensors that, one below the other, it is."""


class Sorter:
    """Finds the place of each tensor. ``stored`` names those that are stored weights.

    ``tables`` are the parameters that get files of their own.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        architecture: Architecture,
        stored: Container[str],
        tables: Container[str] = (),
    ) -> None:
        self.path = path
        self.config = config
        self.architecture = architecture
        self.stored = stored
        self.tables = tables

    def sort(self, listing: Listing, convert: Convert) -> Sorted:
        """Raises :class:`CheckpointError` if what there is is not the model, or not whole."""
        model = self.architecture.model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state = model.state_dict()
        prefix = model.base_model_prefix
        experts = {name for module in self.architecture.experts for name in module.parameters()}
        found = Sorted({}, [], [], [])
        filled: set[str] = set()

        def rename(source: str) -> tuple[str, str]:
            name, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if name not in state and source in state:
                name, pattern = rename_source_key(source, [], [], prefix, state)
            return name, pattern or ""

        names = [tensor.name for tensor in listing.tensors]
        # In transformers' own order, which its lazily activated renamings depend on.
        for tensor in sorted(listing.tensors, key=lambda tensor: dot_natural_key(tensor.name)):
            name, pattern = rename(tensor.name)
            if name not in state:
                found.unused.append(tensor.name)
                continue
            if not self._can_be(tensor, state[name]):
                raise type_error(self.path, self.config, names, tensor)
            if name in experts:
                parameter = found.experts.setdefault(
                    name, Parameter(name, tuple(state[name].shape))
                )
                parameter.converter = by_pattern[pattern] if pattern else None
                parameter.sources.setdefault(pattern, []).append(tensor)
                continue
            if name in self.tables:
                found.tables.setdefault(name, []).append(tensor)
                filled.add(name)
                continue
            if not pattern:
                check_shape(tensor, tuple(state[name].shape))
            found.trunk.append(("" if pattern else name, tensor))
            filled |= _targets(name, by_pattern[pattern]) if pattern else {name}
        for name, tensors in found.tables.items():
            _check_table(name, tensors, tuple(state[name].shape))
        self._check_whole(state, filled, experts, listing)
        found.unfilled.extend(sorted(self._unfilled(state, filled | experts)))
        for module in self.architecture.experts:
            self._check(module, found.experts, listing, convert)
        found.trunk.sort(key=lambda item: item[1].name)
        return found

    def _can_be(self, tensor: CheckpointTensor, parameter: Tensor) -> bool:
        """Whether a tensor of that type holds the values of ``parameter``."""
        if parameter.is_floating_point():
            return tensor.entry.dtype in FLOATS or tensor.name in self.stored
        return tensor.entry.dtype in DTYPE_BYTES

    def _check_whole(
        self, state: Mapping[str, Tensor], filled: set[str], experts: set[str], listing: Listing
    ) -> None:
        """Raises :class:`CheckpointError` if the trunk lacks a parameter."""
        missing = self.architecture.missing_parameters(filled | experts)
        # A buffer may be absent from old checkpoints, but not where the index has it.
        missing |= listing.absent & self._unfilled(state, filled | experts)
        if missing:
            raise self._lacks(f"the weights of {min(missing)}", listing, len(missing) - 1)

    def _unfilled(self, state: Mapping[str, Tensor], filled: set[str]) -> set[str]:
        """The buffers that no tensor fills."""
        buffers = {name for name, _ in self.architecture.model.named_buffers()}
        return (buffers & state.keys()) - filled

    def _lacks(self, what: str, listing: Listing, num_more: int = 0) -> CheckpointError:
        names = [tensor.name for tensor in listing.tensors]
        if not any(name in self.stored for name in names) and is_evident(self.config, names):
            method = find_format(self.path, self.config, names)
            if method and "mxfp4" not in method.lower():
                return quantized_error(self.path, method)
        more = f" (and of {num_more} more parameters)" if num_more else ""
        named = ""
        if listing.absent:
            named = f", and the tensor {min(listing.absent)}, which its index names"
        return CheckpointError(
            f"{self.path} lacks {what}{more}{named}; download the checkpoint again."
        )

    def _check(
        self,
        module: ExpertsModule,
        parameters: Mapping[str, Parameter],
        listing: Listing,
        convert: Convert,
    ) -> None:
        """Raises :class:`CheckpointError` unless every expert of ``module`` is complete."""
        for name in module.parameters():
            parameter = parameters.get(name)
            if parameter is None:
                raise self._lacks(f"the weights of {name}", listing)
            patterns = parameter.converter.source_patterns if parameter.converter else [""]
            for pattern in patterns:
                sources = parameter.sources.get(pattern, [])
                if not sources and self._is_enough(parameter, convert):
                    continue
                if parameter.is_fused(pattern):
                    check_shape(sources[0], (module.num_experts, *sources[0].entry.shape[1:]))
                else:
                    self._check_each_expert(sources, module, pattern, listing)
            self._check_expert_shape(parameter, convert)

    def _check_each_expert(
        self, sources: list[CheckpointTensor], module: ExpertsModule, pattern: str, listing: Listing
    ) -> None:
        """Raises :class:`CheckpointError` unless there is one for each expert, all of a shape.

        transformers would stack what there is, and refuse a number or shapes that do not fit.
        """
        found: dict[int, CheckpointTensor] = {}
        for source in sources:
            numbers = re.findall(r"\.(\d+)(?=\.)", source.name)  # layer, then expert
            expert = int(numbers[-1]) if numbers else -1
            if expert in found:
                raise CheckpointError(
                    f"{self.path} has expert {expert} of layer {module.layer} twice, as "
                    f"{found[expert].name} and as {source.name}; remove one."
                )
            found[expert] = source
        missing = [expert for expert in range(module.num_experts) if expert not in found]
        if missing:
            raise self._lacks(
                f"{pattern.replace('*', str(missing[0])).lstrip('.')} of layer {module.layer} (it "
                f"has that tensor for {len(found)} of {module.num_experts} experts)",
                listing,
            )
        if len(found) > module.num_experts:
            raise CheckpointError(
                f"{self.path} has {len(found)} experts in layer {module.layer}, such as "
                f"{found[max(found)].name}, and its config.json asks for {module.num_experts}; "
                "give the config.json that belongs to these weights."
            )
        usual = sources[0].entry.shape
        for source in sources:
            if source.entry.shape != usual:
                raise CheckpointError(
                    f"{source.file} has {source.name} in the shape {list(source.entry.shape)}, and "
                    f"{sources[0].name} has {list(usual)}; download the checkpoint again."
                )

    def _is_enough(self, parameter: Parameter, convert: Convert) -> bool:
        """Whether transformers makes it of what there is: some of its sources may be scales."""
        try:
            self._check_expert_shape(parameter, convert)
        except CheckpointError:
            return False
        return True

    def _check_expert_shape(self, parameter: Parameter, convert: Convert) -> None:
        """What transformers would make of expert 0, by shapes alone; all others are like it."""
        slices = {
            pattern: [
                torch.empty(
                    (1, *sources[0].entry.shape[1:])
                    if parameter.is_fused(pattern)
                    else sources[0].entry.shape,
                    device="meta",
                )
            ]
            for pattern, sources in parameter.sources.items()
        }
        expected = parameter.shape[1:]
        first = next(iter(parameter.sources.values()))[0]
        try:
            shape = (
                slices[""][0].shape
                if parameter.converter is None
                else convert(parameter.converter, parameter.name, slices).shape
            )
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{first.file} has {first.name} in the shape {list(first.entry.shape)}, from which "
                f"{parameter.name} cannot be made; download the checkpoint again."
            ) from error
        if shape[1:] != expected:
            raise CheckpointError(
                f"{self.path} has {parameter.name} of each expert in the shape {list(shape[1:])}, "
                f"and its config.json asks for {list(expected)}; download the checkpoint again."
            )


def _check_table(name: str, tensors: list[CheckpointTensor], shape: tuple[int, ...]) -> None:
    """Raises :class:`CheckpointError` unless the tensors are the table's, one below the other."""
    for tensor in tensors:
        check_shape(tensor, (*tensor.entry.shape[:1], *shape[1:]))
    num_rows = sum(tensor.entry.shape[0] for tensor in tensors)
    if num_rows != shape[0]:
        raise CheckpointError(
            f"{tensors[0].file.parent} has {num_rows} rows of {name} in {len(tensors)} tensors, "
            f"and its config.json asks for {shape[0]}; download the checkpoint again."
        )


def _targets(name: str, converter: WeightConverter) -> set[str]:
    """The parameters that a converter fills, given the first of them."""
    first = converter.target_patterns[0]
    return {name.replace(first, target) for target in converter.target_patterns}

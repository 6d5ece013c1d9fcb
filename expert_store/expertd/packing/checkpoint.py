"""A checkpoint in Hugging Face's form, read one expert at a time.

Where an expert's weights are, and what has to be done with them, is what transformers itself
would do when it loads the model: its conversion mapping (``transformers.conversion_mapping``,
internal; the range of versions in pyproject is the tested one) names the checkpoint's tensors
of each fused parameter and the operations from one to the other. These are applied to one
expert's slice. So per-expert tensors (Mixtral's w1, w2, w3), fused ones (GPT-OSS, GraniteMoE)
and renamed modules need no code here. Weights that are quantized already, of several tensors each,
are one tensor to all of that (:mod:`expertd.packing.stored`): read as the 16-bit weights that they
stand for, or as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from expertd.packing.architecture import Architecture, ExpertsModule, read_architecture
from expertd.packing.checkpoint_files import (
    CheckpointTensor,
    find_tensors,
    fingerprint,
    quantization_method,
    read_config,
)
from expertd.packing.foreign import quantized_error
from expertd.packing.gguf.listing import list_tensors
from expertd.packing.gguf.model_file import read_model
from expertd.packing.gguf.names import gguf_of
from expertd.packing.quantizer import scale_type
from expertd.packing.scratch import Scratch
from expertd.packing.shards import Shards
from expertd.packing.sorting import Parameter, Sorter
from expertd.packing.stored.description import METHODS, read_description
from expertd.packing.stored.finding import find_stored
from expertd.packing.stored.matrix import StoredMatrix
from expertd.packing.stored.unpacking import dequantized, unpack
from expertd.packing.stored.weight import PLAIN_FORM, Form, StoredWeight
from expertd.packing.tensor_reader import TensorReader
from expertstore.errors import CheckpointError
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.layout import DOWN
from expertstore.pack.manifest import GateOrder
from expertstore.pack.seeing import TEXT_PART

MIN_TABLE_BYTES = 256 << 20
"""What a table has at least in 16 bits; a smaller one is better off in the trunk."""

SAMPLE_BYTES = 64 << 10
"""Read of a tensor to see how large its weights are."""


@dataclass(frozen=True)
class ExpertTensors:
    """One expert in the order of a record: gate rows before up rows, [out, in]."""

    gate_up: Tensor | StoredMatrix  # [2I, H], or without a gate up alone, [I, H]
    down: Tensor | StoredMatrix  # [H, I]
    gate_up_bias: Tensor | None  # [2I], or [I]
    down_bias: Tensor | None  # [H]


class Checkpoint:
    """An open checkpoint. Close it, or use it as a context manager; threads may read from it.

    What is read lies in the :class:`Scratch` given, or in new memory.
    """

    def __init__(
        self,
        path: Path,
        shards: Shards | None = None,
        *,
        table_bytes: int = MIN_TABLE_BYTES,
        text_only: bool = False,
    ) -> None:
        """Reads the configuration and all headers. Raises :class:`CheckpointError`.

        With ``text_only`` the vision part is left out.
        ``shards``: its files are here only for a time; what is read of others is asked of these.
        Embeddings that can be tables are, if they have ``table_bytes`` in 16 bits.
        """
        self.path = path
        self._reader = TensorReader(shards)
        config = read_config(path)
        self.architecture: Architecture = read_architecture(path, text_only=text_only)
        description = read_description(path, config)
        self._stored: Mapping[str, StoredWeight]
        if (file := gguf_of(path)) is not None:
            listing, self._stored = list_tensors(read_model(file), self.architecture)
            files = [each for tensor in listing.tensors for each in self._physical(tensor)]
        else:
            listing = find_tensors(path, config)
            files = listing.tensors
            listing, self._stored = find_stored(path, listing, description)
        self.fingerprint = shards.fingerprint if shards else fingerprint(path, files)
        packings = {weight.packing for weight in self._stored.values()}
        if packings and description.method not in {"", *METHODS}:
            raise quantized_error(path, description.method)
        self.rows_per_token = self.architecture.tables(table_bytes)
        """Of each table, by the model's name of the parameter."""
        sorter = Sorter(path, config, self.architecture, self._stored, self.rows_per_token)
        found = sorter.sort(listing, self._convert)
        self._parameters = found.experts
        self.trunk = found.trunk
        """All but the experts, each with the model's own name of the parameter it fills: one that
        is made of several or split into several comes with an empty name."""
        self.tables = found.tables
        """By the model's name of the parameter: the tensors that, one below the other, it is."""
        self.unused = found.unused
        """Tensors that the architecture has no place for; transformers ignores them too."""
        self.unfilled = found.unfilled
        """Buffers of the model that the checkpoint lacks; transformers makes them up too."""
        self.types = self._types()
        self.is_float32 = not self.types & {"BF16", "F16"}
        self.dtype = "F16" if self._holds_all() else "BF16"
        """Of the model's 16-bit weights, in safetensors' names: the one that has the range of all
        types that its tensors come in; float32 becomes BF16."""
        self.stored_as = ", ".join(sorted(packings))
        """How weights that are quantized already are packed, in words."""
        self.disagrees = "" if packings else quantization_method(config)
        """The method by which config.json has the checkpoint quantized, though it is not so."""
        if packings - METHODS.get(description.method, packings):
            self.disagrees = description.method

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
        self._reader.close()

    @property
    def vision_bytes(self) -> int:
        """Of the tensors of its vision part that are packed."""
        head = self.architecture.head()
        return sum(
            source.entry.num_bytes
            for name, source in self.trunk
            if self.architecture.sees and not name.startswith(TEXT_PART) and name not in head
        )

    def drop(self, file: Path) -> None:
        """Closes a file of which nothing is left to read, and says so to its :class:`Shards`."""
        self._reader.drop(file)

    def expert_files(self, module: ExpertsModule, expert: int) -> set[Path]:
        """The files that hold something of the expert."""
        return {tensor.file for tensor, _ in self._tensors_of(module, expert)}

    def trunk_files(self, source: CheckpointTensor) -> set[Path]:
        """The files that hold a tensor of the trunk, or its pieces."""
        return {each.file for each in self._physical(source)}

    def read(self, tensor: CheckpointTensor, scratch: Scratch | None = None) -> Tensor:
        """The whole tensor, of type :meth:`type_of`. Raises :class:`CheckpointError`."""
        scratch = scratch or Scratch()
        weight = self._stored.get(tensor.name)
        if weight is not None:
            return self._read_weight(weight, scratch)
        buffer = scratch.take(tensor.entry.num_bytes)
        return self._reader.read_bytes(tensor, 0, buffer).view(tensor.entry.shape)

    def read_stored(
        self, tensor: CheckpointTensor, scratch: Scratch | None = None
    ) -> StoredMatrix | Tensor:
        """As :meth:`read`, but a matrix of the trunk that a record can hold as it is comes so."""
        weight = self._stored.get(tensor.name)
        if weight is None or weight.is_fused:
            return self.read(tensor, scratch)
        return self._matrix(weight, None, scratch or Scratch())

    def read_rows(
        self, tensor: CheckpointTensor, begin: int, num_rows: int, scratch: Scratch
    ) -> Tensor:
        """Some rows of a matrix, in its dtype. Raises :class:`CheckpointError`."""
        if tensor.name in self._stored:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} is a table that comes quantized, which is not "
                "supported; pack a checkpoint that has it in 16 bits."
            )
        row = tensor.entry.num_bytes // tensor.entry.shape[0]
        buffer = scratch.take(num_rows * row)
        return self._reader.read_bytes(tensor, begin * row, buffer).view(num_rows, -1)

    def type_of(self, tensor: CheckpointTensor) -> str:
        """As what the tensor is read, in safetensors' names: stored weights as 16-bit ones."""
        return self.dtype if tensor.name in self._stored else tensor.entry.dtype

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
                for leaf in (module.inward, DOWN)
            )
            biases = [_gate_rows_first(gate_up) if interleaved else gate_up, down]
        return ExpertTensors(
            self._weight(module, f"{module.inward}_proj", expert, scratch),
            self._weight(module, f"{DOWN}_proj", expert, scratch),
            *biases,
        )

    def _weight(
        self, module: ExpertsModule, leaf: str, expert: int, scratch: Scratch
    ) -> Tensor | StoredMatrix:
        """The expert's matrix [out, in], gate rows first."""
        name = module.parameter(leaf)
        interleaved = leaf == "gate_up_proj" and module.gate_order is GateOrder.INTERLEAVED
        order = _gate_rows_first if interleaved else Tensor.contiguous
        stored = self._stored_pieces(module, self._parameters[name], expert)
        matrices = [self._matrix(weight, expert, scratch) for weight in stored]
        if kept := [each for each in matrices if isinstance(each, StoredMatrix)]:
            rows = _kept_form(stored, interleaved=interleaved).precision.group_rows
            return StoredMatrix.stacked([each.in_blocks_of(rows) for each in kept]).reordered(order)
        weight = self._slice_parameter(name, expert, scratch)
        return order(weight.T if module.is_transposed else weight)

    def _stored_pieces(
        self, module: ExpertsModule, parameter: Parameter, expert: int
    ) -> list[StoredWeight]:
        """The stored weights of one form that are the expert's matrix, one below the other.

        None if one of them is not stored, or more is to be done than to move rows.
        """
        sources = parameter.stacked(expert)
        if parameter.converter is None:
            sources = parameter.sources[""]
        found = [self._stored[source.name] for source in sources if source.name in self._stored]
        kinds = {(weight.packing, weight.form, weight.is_transposed) for weight in found}
        fits = len(found) == len(sources) and len(kinds) == 1
        if not fits or found[0].form is None or not found[0].form.precision.bits:
            return []
        return found if found[0].is_transposed == module.is_transposed else []

    def stored_form(self, module: ExpertsModule, leaf: str) -> Form | None:
        """The form in which a record holds the matrix ``leaf`` of all experts as it is stored.

        None if it is not stored. Raises :class:`CheckpointError` if no form does that.
        """
        parameter = self._parameters[module.parameter(leaf)]
        weights = [
            self._stored.get(source.name)
            for sources in parameter.sources.values()
            for source in sources
        ]
        if weights[0] is not None and (nearest := weights[0].nearest) is not None:
            bits = nearest.bits
            return Form(nearest, self.scale_type(module, leaf, bits)) if bits else PLAIN_FORM
        forms = {weight.exact_form(self.path) if weight is not None else None for weight in weights}
        if len(forms) > 1:
            kinds = sorted(
                {source.entry.dtype for each in parameter.sources.values() for source in each}
            )
            raise CheckpointError(
                f"{self.path} has the experts of layer {module.layer} in several forms "
                f"({', '.join(kinds)}), and a record has one; --scheme 4bit, or --experts 4g64 and "
                "the like, quantizes them anew."
            )
        (form,) = forms
        if form is None or not form.precision.bits:
            return form
        stored = self._stored_pieces(module, parameter, 0)
        if not stored:
            raise CheckpointError(
                f"{self.path} has {parameter.name} stored in {self.stored_as}, and transformers "
                "does more with it than to move rows, which changes it; --scheme 4bit, or "
                "--experts 4g64 and the like, quantizes it anew."
            )
        interleaved = leaf == "gate_up_proj" and module.gate_order is GateOrder.INTERLEAVED
        return _kept_form(stored, interleaved=interleaved)

    def kept_kinds(self) -> str:
        """What the experts are stored in that a record can hold as it is; empty if they are not."""
        sources = (
            source
            for parameter in self._parameters.values()
            for sources in parameter.sources.values()
            for source in sources
        )
        found = (self._stored.get(source.name) for source in sources)
        kinds = {each.kind for each in found if each and each.form and each.form.precision.bits}
        return ", ".join(sorted(kinds))

    def samples_by_kind(self) -> Iterator[tuple[StoredWeight, dict[str, Tensor]]]:
        """Of each way in which experts' matrices are stored: one, and first rows of its pieces."""
        seen = set()
        for parameter in self._parameters.values():
            for source, is_fused in parameter.of_expert(0):
                weight = self._stored.get(source.name)
                if weight is not None and weight.kind not in seen:
                    seen.add(weight.kind)
                    yield weight, self._read_pieces(weight, 0 if is_fused else None, only_head=True)

    def trunk_form(self, tensor: CheckpointTensor) -> Form | None:
        """The same for a matrix of the trunk."""
        weight = self._stored.get(tensor.name)
        if weight is None:
            return None
        if (nearest := weight.nearest) is None:
            return weight.exact_form(self.path)
        if not nearest.bits:
            return PLAIN_FORM
        return Form(nearest, self.trunk_scale_type(tensor, nearest.bits))

    def scale_type(self, module: ExpertsModule, leaf: str, bits: int) -> str:
        """In which type the scales of the experts' matrix ``leaf`` are to be stored in ``bits``.

        By a sample, from which an expert may differ by some powers of two.
        """
        parameter = self._parameters[module.parameter(leaf)]
        last = module.num_experts - 1
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
        weight = self._stored.get(tensor.name)
        if weight is not None:
            matrix = self._matrix(weight, expert if is_fused else 0, Scratch(), only_head=True)
            return _largest(dequantized(matrix))
        num_bytes = tensor.entry.num_bytes // (tensor.entry.shape[0] if is_fused else 1)
        buffer = Scratch().take(min(num_bytes, SAMPLE_BYTES))
        return _largest(self._reader.read_bytes(tensor, expert * num_bytes * is_fused, buffer))

    def pieces(
        self, module: ExpertsModule, expert: int
    ) -> Iterator[tuple[CheckpointTensor, Tensor]]:
        """Each tensor that holds something of the expert, and what of it is the expert's.

        As the files have it: the pieces of stored weights are tensors of their own.
        """
        for each, is_fused in self._tensors_of(module, expert):
            yield each, self._reader.read(each, expert if is_fused else None, Scratch())

    def _tensors_of(
        self, module: ExpertsModule, expert: int
    ) -> Iterator[tuple[CheckpointTensor, bool]]:
        """Each tensor that holds something of the expert, and whether of all others as well."""
        for name in module.parameters():
            for source, is_fused in self._parameters[name].of_expert(expert):
                for each in self._physical(source):
                    yield each, is_fused and each.entry.shape[:1] == source.entry.shape[:1]

    def _physical(self, tensor: CheckpointTensor) -> list[CheckpointTensor]:
        """The tensor, or the pieces of the stored weight that it is."""
        weight = self._stored.get(tensor.name)
        return [tensor] if weight is None else [*weight.pieces.values()]

    def is_stored(self, tensor: CheckpointTensor) -> bool:
        """Whether it is of several tensors, and read as what these stand for."""
        return tensor.name in self._stored

    def trunk_pieces(self, source: CheckpointTensor) -> Iterator[tuple[CheckpointTensor, Tensor]]:
        """A tensor of the trunk, or its pieces, as the files have them."""
        for each in self._physical(source):
            yield each, self._reader.read(each, None, Scratch())

    def expert_bits(self, module: ExpertsModule) -> float:
        """Bits of a weight of an expert in the checkpoint, about."""
        num_bytes = sum(
            each.entry.num_bytes / (each.entry.shape[0] if is_fused else 1)
            for each, is_fused in self._tensors_of(module, 0)
        )
        return 8 * num_bytes / (3 * module.hidden_size * module.intermediate_size)

    def _types(self) -> set[str]:
        """Of the experts' weights and biases, in safetensors' names."""
        return {
            self._range_of(source)
            for parameter in self._parameters.values()
            for sources in parameter.sources.values()
            for source in sources
        }

    def _holds_all(self) -> bool:
        """Whether F16 has the range of all 16-bit tensors, and of the experts' others."""
        return self.types == {"F16"} and "BF16" not in {
            self._range_of(source) for _, source in self.trunk
        }

    def _range_of(self, tensor: CheckpointTensor) -> str:
        """Its type, or the 16-bit one that has the range of the stored weight that it is."""
        weight = self._stored.get(tensor.name)
        return tensor.entry.dtype if weight is None else weight.dtype

    def _matrix(
        self,
        weight: StoredWeight,
        expert: int | None,
        scratch: Scratch,
        *,
        only_head: bool = False,
    ) -> StoredMatrix | Tensor:
        """One matrix [out, in] of ``weight``: if that is of all experts, the ``expert``'s."""
        return unpack(weight, self._read_pieces(weight, expert, scratch, only_head=only_head))

    def _read_pieces(
        self,
        weight: StoredWeight,
        expert: int | None,
        scratch: Scratch | None = None,
        *,
        only_head: bool = False,
    ) -> dict[str, Tensor]:
        """What :meth:`_matrix` is made of."""
        fused = expert if weight.is_fused else None
        pieces = {}
        for part, piece in weight.pieces.items():
            sliced = fused if piece.entry.shape[:1] == weight.shape[:1] else None
            rows = weight.head[part] if only_head else None
            pieces[part] = self._reader.read(piece, sliced, scratch or Scratch(), rows)
        return pieces

    def _read_weight(self, weight: StoredWeight, scratch: Scratch) -> Tensor:
        """What a stored weight stands for, in the model's 16-bit type, in its shape."""
        dtype = TORCH_DTYPES[self.dtype]
        if not weight.is_fused:
            return dequantized(self._matrix(weight, None, scratch)).to(dtype)
        matrices = [
            dequantized(self._matrix(weight, expert, scratch)).to(dtype)
            for expert in range(weight.shape[0])
        ]
        stacked = torch.stack(matrices)
        return stacked.transpose(1, 2) if weight.is_transposed else stacked

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
        """One expert's piece of a tensor of all experts, in its type by :meth:`type_of`."""
        weight = self._stored.get(tensor.name)
        if weight is None:
            return self._reader.read(tensor, expert, scratch)
        matrix = dequantized(self._matrix(weight, expert, scratch)).to(TORCH_DTYPES[self.dtype])
        return matrix.T if weight.is_transposed else matrix

    def _read_stacked(self, pieces: Sequence[CheckpointTensor], scratch: Scratch) -> Tensor:
        """Matrices of equal width and type, one below the other."""
        if pieces[0].name in self._stored:
            return torch.cat([self.read(piece, scratch) for piece in pieces])
        buffer = scratch.take(sum(piece.entry.num_bytes for piece in pieces))
        end = 0
        for piece in pieces:
            begin, end = end, end + piece.entry.num_bytes
            self._reader.read_bytes(piece, 0, buffer[begin:end])
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
        model = _OfOneExpert(self.architecture.model)
        results: dict[str, Any] = converter.convert(name, model=model, config=config)
        result = results[name]
        fused: Tensor = result[0] if isinstance(result, list) else result
        return fused


class _OfOneExpert:
    """A model as operations see it that look at the shape of what they make."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._model = model

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """With the weights of the first expert alone."""
        parameter: Tensor = self._model.get_parameter(name)
        return parameter[:1]


def _kept_form(weights: Sequence[StoredWeight], *, interleaved: bool) -> Form:
    """The form of a matrix that is made of ``weights``, one below the other.

    ``interleaved``: its rows are moved then.
    """
    form = weights[0].form
    assert form is not None, "there is none of what is not kept"
    if len(weights) == 1 and not interleaved:
        return form
    return form.with_rows(1 if interleaved else weights[0].num_rows)


def _largest(values: Tensor) -> float:
    return float(values.float().abs().max()) if values.numel() else 0.0


def _gate_rows_first(rows: Tensor) -> Tensor:
    """Rows gate, up, gate, up ... become all gate rows, then all up rows."""
    return torch.cat((rows[0::2], rows[1::2]))

"""A parameter of the model as tensors of a GGUF file: a stored weight like others."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.gguf.blocks import dequantize, split
from expertd.packing.gguf.model_file import GgufModel
from expertd.packing.gguf.origins import Origin
from expertd.packing.gguf.types import KEPT, PLAIN_TYPES, Type, is_known, precision_of
from expertd.packing.schemes import Precision
from expertd.packing.stored.matrix import StoredMatrix
from expertd.packing.stored.weight import PLAIN_FORM, Form, Packing, StoredWeight
from expertstore.errors import CheckpointError
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.tensor_file import TensorEntry

SAMPLE_ROWS = 64
"""Of a matrix, to see how large its weights are and what they lose."""


@dataclass(frozen=True, kw_only=True)
class GgufWeight(StoredWeight):
    """``pieces`` are rows of blocks [..., out, bytes] (U8), by their numbers."""

    origin: Origin
    types: tuple[Type, ...]
    """Of the pieces."""
    is_of_experts: bool
    """Whether the pieces have a slice for each expert."""

    @property
    def is_fused(self) -> bool:
        """Whether it is that of all experts."""
        return self.is_of_experts

    @property
    def kind(self) -> str:
        """The types' names, for users."""
        return " and ".join(sorted({kind.name for kind in self.types}))

    @property
    def dtype(self) -> str:
        """F16 and F32 if all of it comes so and is no vector, such as a bias."""
        kinds = {PLAIN_TYPES.get(kind, "") for kind in self.types}
        is_matrix = len(self.shape) - self.is_of_experts > 1
        return kinds.pop() if is_matrix and kinds in ({"F16"}, {"F32"}) else "BF16"

    @property
    def nearest(self) -> Precision | None:
        """What it is quantized to where the scheme keeps what it can, and cannot keep this."""
        return precision_of(self.types[0]) if self.form is None else None


def make_weight(
    model: GgufModel,
    name: str,
    shape: tuple[int, ...],
    origin: Origin,
    *,
    of_experts: bool = False,
    is_transposed: bool = False,
) -> GgufWeight:
    """The parameter ``name`` of that shape, as the model has it.

    Raises :class:`CheckpointError` if the file's tensors do not make it.
    """
    pieces: dict[str, CheckpointTensor] = {}
    types = []
    for number, source in enumerate(origin.tensors):
        tensor = model.tensors.get(source)
        if tensor is None:
            raise CheckpointError(f"{model.file} lacks {source}; get another file of the model.")
        if not is_known(tensor.type):
            raise CheckpointError(
                f"{tensor.file} has {source} in {tensor.type.name}, which is not read; get a file "
                "in another quantization."
            )
        *outer, _ = tensor.shape
        width = tensor.num_bytes // prod(outer)
        entry = TensorEntry(source, "U8", (*outer, width), tensor.offset, tensor.num_bytes)
        pieces[str(number)] = CheckpointTensor(tensor.file, entry)
        types.append(tensor.type)
    weight = GgufWeight(
        name,
        shape,
        Packing.GGUF,
        pieces,
        _form(types, origin, is_matrix=len(shape) - of_experts == 2),
        head=dict.fromkeys(pieces, SAMPLE_ROWS),
        is_transposed=is_transposed,
        origin=origin,
        types=tuple(types),
        is_of_experts=of_experts,
    )
    _check_shape(model, weight)
    return weight


def _check_shape(model: GgufModel, weight: GgufWeight) -> None:
    """Raises :class:`CheckpointError` if the pieces cannot be the parameter."""
    shape, sources = weight.shape, [model.tensors[name] for name in weight.origin.tensors]
    fits = sum(prod(source.shape) for source in sources) == prod(shape)
    if weight.is_of_experts:
        fits &= all(source.shape[0] == shape[0] for source in sources)
    if len(shape) - weight.is_of_experts == 2 and weight.origin.undo is None:
        columns = shape[-2 if weight.is_transposed else -1]
        fits &= all(source.shape[-1] == columns for source in sources)
    if not fits:
        found = " and ".join(f"{source.name} {list(source.shape)}" for source in sources)
        raise CheckpointError(
            f"{sources[0].file} has {found[:200]}, and its metadata asks for {list(shape)} "
            f"({weight.name}); download it again."
        )


def _form(types: list[Type], origin: Origin, *, is_matrix: bool) -> Form | None:
    """The form in which it is kept; None if it is to be quantized anew."""
    kind = types[0]
    if not is_matrix or kind in PLAIN_TYPES:
        return PLAIN_FORM
    if kind in KEPT and set(types) == {kind} and origin.undo is None:
        return Form(KEPT[kind])
    return None


def unpack(weight: GgufWeight, pieces: Mapping[str, Tensor]) -> StoredMatrix | Tensor:
    """The matrix of ``pieces``, or of their first rows for a sample: as kept, or float32."""
    blocks = list(pieces.values())
    is_whole = all(
        tuple(piece.shape) == weight.pieces[part].entry.shape[weight.is_of_experts :]
        for part, piece in pieces.items()
    )
    rows = weight.origin.rows if is_whole else None
    if weight.form is not None and weight.form.precision.bits:
        joined = torch.cat(blocks)
        return split(weight.types[0], joined if rows is None else joined[rows])
    tensors = [_numbers(*pair) for pair in zip(weight.types, blocks, strict=True)]
    if not is_whole or weight.origin.undo is None:
        result = torch.cat(tensors)
    else:
        result = weight.origin.undo(tensors)
    return result if rows is None else result[rows]


def _numbers(kind: Type, blocks: Tensor) -> Tensor:
    """The float32 weights of blocks [..., bytes]."""
    if kind in PLAIN_TYPES:
        return blocks.contiguous().view(TORCH_DTYPES[PLAIN_TYPES[kind]]).float()
    *outer, width = blocks.shape
    return dequantize(kind, blocks.reshape(-1, width)).view(*outer, -1)

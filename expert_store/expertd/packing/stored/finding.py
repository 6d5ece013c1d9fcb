"""Which tensors of a checkpoint are pieces of stored weights, by their names, types and shapes.

What the tensors are decides; ``config.json`` is asked for what they do not tell.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from expertd.packing.checkpoint_files import CheckpointTensor, Listing
from expertd.packing.stored.description import Description
from expertd.packing.stored.floats import find_blocks, find_fp8, find_nibbles
from expertd.packing.stored.integers import find_bytes, find_packed, find_qweight
from expertd.packing.stored.pieces import Pieces
from expertd.packing.stored.weight import StoredWeight
from expertstore.errors import CheckpointError

FINDERS: tuple[Callable[[Pieces, CheckpointTensor], StoredWeight | None], ...] = (
    find_blocks,
    find_nibbles,
    find_packed,
    find_bytes,
    find_qweight,
    find_fp8,
)
"""Each knows a stored weight by the largest of its pieces."""

_UNUSED = (".input_scale", ".input_global_scale", ".weight_shape")
"""Ends of the names of tensors beside a stored weight that nothing here needs."""


def find_stored(
    path: Path, listing: Listing, description: Description
) -> tuple[Listing, dict[str, StoredWeight]]:
    """``listing`` with each stored weight as one tensor, and these by their names.

    Raises :class:`CheckpointError` if a piece of one is missing, or of another shape.
    """
    by_name = {tensor.name: tensor for tensor in listing.tensors}
    found = {weight.name: weight for weight in _weights(Pieces(path, by_name, description))}
    gone = {piece.name for weight in found.values() for piece in weight.pieces.values()}
    gone |= {f"{name.removesuffix('.weight')}{end}" for name in found for end in _UNUSED}
    tensors = [tensor for tensor in listing.tensors if tensor.name not in gone]
    tensors += [weight.tensor for weight in found.values()]
    return replace(listing, tensors=tensors), found


def _weights(pieces: Pieces) -> Iterator[StoredWeight]:
    for tensor in pieces.tensors.values():
        try:
            found = (find(pieces, tensor) for find in FINDERS)
            weight = next((weight for weight in found if weight is not None), None)
        except (ArithmeticError, LookupError, ValueError) as error:  # of numbers that nobody writes
            raise CheckpointError(
                f"{tensor.file} has {tensor.name} in the shape {list(tensor.entry.shape)}, which "
                "does not go with its scales and config.json; download the checkpoint again."
            ) from error
        if weight is not None:
            yield weight

"""What a packing is refused for before torch is imported, which takes seconds.

The packer has the last word on each: this looks at names, sizes and headers alone, and lets pass
what it is not sure of.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from expertd.packing.checkpoint_files import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointTensor,
    Listing,
    read_config,
)
from expertd.packing.gguf.names import gguf_of
from expertd.packing.schemes import Precision, Scheme
from expertd.packing.stored.description import read_description
from expertd.packing.stored.finding import find_stored
from expertd.packing.stored.weight import StoredWeight
from expertstore.errors import CheckpointError, ConfigError, PackError
from expertstore.pack.manifest import MANIFEST_NAME
from expertstore.pack.tensor_file import TensorEntry, read_header
from expertstore.sizes import format_bytes

PARTIAL_SUFFIX = ".partial"
"""Of the directory beside a pack to be in which the work lies."""
HUB_FOLDER = "hub"
"""In that directory: what is here of a checkpoint that is fetched meanwhile."""
GGUF_FOLDER = "gguf"
"""In that directory: a model in GGUF as a checkpoint."""
_SURE = 0.9
"""Of the weights: some checkpoints have tensors that no model has a place for."""
_FLOATS = {"BF16", "F16", "F32", "F64"}
"""Types of weights that are not quantized."""


def check_early(
    source: Path, destination: Path, scheme: Scheme, *, force: bool, beside_bytes: int = 0
) -> None:
    """All of it. Raises ConfigError, CheckpointError and PackError."""
    absolute = destination.absolute()
    try:
        check_checkpoint(source)
        check_destination(absolute, force=force)
        check_room(source, absolute, scheme, beside_bytes)
    except OSError as error:  # of directories that this user may not look into
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.") from error


def check_checkpoint(source: Path) -> None:
    """Raises CheckpointError if ``source`` is no checkpoint, and says what to do instead."""
    if (source / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{source} is a pack already; serve it, or give the checkpoint that it was made of."
        )
    read_config(source)


def check_destination(destination: Path, *, force: bool) -> None:
    """Raises PackError if something is there that is not to be replaced.

    Raises ConfigError if it has no parent.

    A packing that was interrupted after its last step has a pack and no work left; the packer
    knows whether it was this one.
    """
    if not destination.parent.is_dir():
        raise ConfigError(f"{destination.parent} is not a directory; make it first.")
    partial = partial_of(destination)
    if (partial / "journal").is_file() and not (partial / "pack").exists():
        return
    if not destination.is_symlink() and not destination.exists():
        return
    if not force:
        raise PackError(f"{destination} exists already; give --force to replace it.")
    if destination.is_symlink() or not (destination / MANIFEST_NAME).is_file():
        raise PackError(f"{destination} exists and is not a pack; --force replaces only packs.")


def check_room(source: Path, destination: Path, scheme: Scheme, beside_bytes: int = 0) -> None:
    """Raises PackError if the disk of ``destination`` cannot have room for the pack.

    ``beside_bytes``: what else is on the disk while it is made.
    """
    partial = partial_of(destination)
    begun = sum(512 * file.stat().st_blocks for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(destination.parent).free + begun
    least = least_bytes(source, scheme) + beside_bytes
    if least > free:
        raise PackError(
            f"The disk of {destination.parent} has {format_bytes(free)} free, and making the pack "
            f"takes {format_bytes(least)} or more; free some, choose another place, or fewer bits."
        )


def least_bytes(source: Path, scheme: Scheme) -> int:
    """What a pack of the checkpoint takes at least, by what can be read of its files."""
    return int(_SURE * sum(about_bytes(source, scheme)))


def about_bytes(source: Path, scheme: Scheme) -> tuple[int, int]:
    """About what a pack's experts take, and what the rest does, by the files' headers."""
    others = min((scheme.attention, scheme.dense, scheme.head), key=_bits)
    of_experts = of_others = 0.0
    for entry, is_stored in _entries(source):
        if ".experts." in entry.name:
            of_experts += _num_bytes(entry, scheme.experts, is_stored=is_stored)
        else:
            of_others += _num_bytes(entry, others, is_stored=is_stored)
    return int(of_experts), int(of_others)


def partial_of(destination: Path) -> Path:
    """Where the work lies until the pack is whole."""
    return destination.parent / (destination.name + PARTIAL_SUFFIX)


def _entries(source: Path) -> Iterator[tuple[TensorEntry, bool]]:
    """Of the files that are read, for others may lie beside them; stored weights are one each."""
    if (file := gguf_of(source)) is not None:
        yield from _gguf_entries(file)
        return
    try:
        index = msgspec.json.decode((source / INDEX_NAME).read_bytes())
        names = {*index["weight_map"].values()}
    except (OSError, msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError):
        names = {SINGLE_NAME}
    tensors = []
    for name in names:
        with suppress(OSError, ValueError):
            file = source / str(name)
            tensors += [CheckpointTensor(file, entry) for entry in read_header(file).values()]
    listing = Listing(tensors)
    stored: dict[str, StoredWeight] = {}
    with suppress(CheckpointError, FileNotFoundError):  # which the packer tells of
        description = read_description(source, read_config(source))
        listing, stored = find_stored(source, listing, description)
    for tensor in listing.tensors:
        yield tensor.entry, tensor.name in stored


def _gguf_entries(file: Path) -> Iterator[tuple[TensorEntry, bool]]:
    from expertd.packing.gguf.model_file import read_model
    from expertd.packing.gguf.types import PLAIN_TYPES, precision_of

    for tensor in read_model(file).tensors.values():
        name = tensor.name.replace("_exps.", ".experts.")
        num_bytes = int(math.prod(tensor.shape) * _bits(precision_of(tensor.type)) / 8)
        entry = TensorEntry(name, "BF16", tensor.shape, tensor.offset, num_bytes)
        yield entry, tensor.type not in PLAIN_TYPES


def _num_bytes(entry: TensorEntry, precision: Precision, *, is_stored: bool) -> float:
    """Of a matrix; none of what may be left out or be something else: vectors, unknown types."""
    if is_stored and precision.is_kept:
        return entry.num_bytes
    is_weight = is_stored or entry.dtype in _FLOATS
    if len(entry.shape) < 2 or not is_weight:
        return 0.0
    return math.prod(entry.shape) * _bits(precision) / 8


def _bits(precision: Precision) -> float:
    """Of a weight at least: each group has a scale and a zero of 8 bits."""
    if not precision.bits:
        return 16.0
    return precision.bits + 16 / precision.group_size

"""What a packing is refused for before torch is imported, which takes seconds.

The packer has the last word on each: this looks at names, sizes and headers alone, and lets pass
what it is not sure of.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from expertd.packing.checkpoint_files import INDEX_NAME, SINGLE_NAME, read_config
from expertd.packing.schemes import Precision, Scheme
from expertstore.errors import CheckpointError, ConfigError, PackError
from expertstore.pack.layout import Encoding
from expertstore.pack.manifest import MANIFEST_NAME
from expertstore.pack.tensor_file import TensorEntry, read_header
from expertstore.sizes import format_bytes

PARTIAL_SUFFIX = ".partial"
"""Of the directory beside a pack to be in which the work lies."""
HUB_FOLDER = "hub"
"""In that directory: what is here of a checkpoint that is fetched meanwhile."""
_SURE = 0.9
"""Of the weights: some checkpoints have tensors that no model has a place for."""
_WEIGHT_BYTES = {"BF16": 2.0, "F16": 2.0, "F32": 4.0, "F64": 8.0, "F8_E4M3": 1.0, "U8": 0.5}
"""Bytes of a weight by its type; of MXFP4 two share one."""


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
    if source.suffix == ".gguf" or (source.is_dir() and _only_gguf(source)):
        raise CheckpointError(
            f"{source} is GGUF, whose weights are quantized in a form of its own; download the "
            "model's 16-bit checkpoint (config.json and safetensors), and pack that."
        )
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
    bits = _bits(scheme.experts)
    others = min(_bits(each) for each in (scheme.attention, scheme.dense, scheme.head))
    of_experts = of_others = 0.0
    for entry in _entries(source):
        if ".experts." in entry.name:
            of_experts += _num_weights(entry) * bits / 8
        else:
            of_others += _num_weights(entry) * others / 8
    return int(of_experts), int(of_others)


def partial_of(destination: Path) -> Path:
    """Where the work lies until the pack is whole."""
    return destination.parent / (destination.name + PARTIAL_SUFFIX)


def _only_gguf(directory: Path) -> bool:
    return any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors"))


def _entries(source: Path) -> Iterator[TensorEntry]:
    """Of the files that are read: others may lie beside them."""
    try:
        index = msgspec.json.decode((source / INDEX_NAME).read_bytes())
        names = {*index["weight_map"].values()}
    except (OSError, msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError):
        names = {SINGLE_NAME}
    for name in names:
        with suppress(OSError, ValueError):
            yield from read_header(source / str(name)).values()


def _num_weights(entry: TensorEntry) -> float:
    """None of what may be left out or be something else: vectors, scales, unknown types."""
    if len(entry.shape) < 2 or "scale" in entry.name or entry.dtype not in _WEIGHT_BYTES:
        return 0.0
    return entry.num_bytes / _WEIGHT_BYTES[entry.dtype]


def _bits(precision: Precision) -> float:
    """Of a weight at least: each group has a scale and a zero of 8 bits, in MXFP4 no zero."""
    if not precision.bits:
        return 16.0
    scale = 8 if precision.encoding is Encoding.MXFP4 else 16
    return precision.bits + scale / precision.group_size

"""A pack of a fine-tune that keeps only the experts that differ from its base's.

The others, and the trunk if it is the same, are the base's own files under a second name (hard
links): they take no more of the disk, and stay if the base's pack is removed.
"""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from expertd.packing.finished_files import flush
from expertstore.errors import PackError
from expertstore.pack.manifest import (
    MANIFEST_NAME,
    Layer,
    Manifest,
    PackFile,
    encode_manifest,
    read_manifest,
)
from expertstore.pack.reader import PackReader
from expertstore.pack.tensor_file import build_header

OWN_NAME = "experts-own.safetensors"


@dataclass(frozen=True)
class Shared:
    """What a pack has of its base's, and by itself."""

    num_shared: int
    num_own: int
    shares_trunk: bool


def check_shareable(base: Path, destination: Path) -> None:
    """Raises PackError if ``base`` is no pack, or on another disk than ``destination`` will be."""
    read_manifest(base)
    if base.stat().st_dev != destination.parent.stat().st_dev:
        raise PackError(
            f"{base} is on another file system than {destination.parent}, so that their packs "
            "cannot share files; put the new pack beside its base."
        )


def share_with(pack: Path, base: Path) -> Shared:
    """Makes the pack keep only what ``base`` does not have.

    Raises PackError if the two are of different forms or schemes; the pack is then as it was.
    """
    own, others = read_manifest(pack).manifest, read_manifest(base).manifest
    if _form(own) != _form(others):
        raise PackError(
            f"{pack} has other layers or another scheme than its base {base}, so that no record "
            "can be the same; pack both by one scheme."
        )
    work = pack.parent / f".{pack.name}.shared"
    try:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(pack, work, ignore=_weights(own))
        try:
            made, shared = _link(pack, base, own, others, work)
            (work / MANIFEST_NAME).write_bytes(encode_manifest(made))
            for path in (*work.iterdir(), work):
                flush(path)
            replaced = pack.parent / f".{pack.name}.replaced"
            pack.rename(replaced)
            work.rename(pack)
            flush(pack.parent)
            shutil.rmtree(replaced)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        why = error.strerror
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            why = f"{why}: its file system must be the base's, and have hard links"
        raise PackError(f"{error.filename or pack} cannot be shared: {why}.") from error
    return shared


def _form(manifest: Manifest) -> tuple[object, ...]:
    layers = [(each.layer, each.num_experts, each.layout) for each in manifest.layers]
    return manifest.layouts, layers, manifest.gate_order, manifest.dtype


def _weights(manifest: Manifest) -> Callable[[Any, list[str]], set[str]]:
    """For ``shutil.copytree``: leaves out all that is linked or written anew."""
    return shutil.ignore_patterns(
        MANIFEST_NAME, manifest.trunk.name, *(file.name for file in manifest.files)
    )


def _link(
    pack: Path, base: Path, own: Manifest, others: Manifest, work: Path
) -> tuple[Manifest, Shared]:
    """Fills ``work``; the manifest of what is there."""
    differ = [
        (layer, expert)
        for layer, other in zip(own.layers, others.layers, strict=True)
        for expert in range(layer.num_experts)
        if layer.checksums[expert] != other.checksums[expert]
    ]
    files: list[PackFile] = []
    placed: dict[tuple[int, int], int] = {}
    if differ:
        sizes = [own.layouts[layer.layout].record_bytes for layer, _ in differ]
        names = [f"layers.{layer.layer}.experts.{expert}" for layer, expert in differ]
        header = build_header([(n, "U8", (size,)) for n, size in zip(names, sizes, strict=True)])
        with (work / OWN_NAME).open("wb") as out, PackReader(pack) as reader:
            out.write(header)
            for layer, expert in differ:
                placed[layer.layer, expert] = out.tell()
                out.write(reader.read_record(layer.layer, expert))
            files.append(PackFile(name=OWN_NAME, num_bytes=out.tell()))
    linked: dict[int, int] = {}
    layers = []
    for layer, other in zip(own.layers, others.layers, strict=True):
        numbers, offsets = [], []
        for expert in range(layer.num_experts):
            if (at := placed.get((layer.layer, expert))) is not None:
                numbers.append(0)
                offsets.append(at)
                continue
            file = other.files[expert]
            if file not in linked:
                linked[file] = len(files)
                known = others.files[file]
                files.append(
                    PackFile(name=f"shared-{file:05d}.safetensors", num_bytes=known.num_bytes)
                )
                os.link(base / known.name, work / files[-1].name)
            numbers.append(linked[file])
            offsets.append(other.offsets[expert])
        layers.append(_moved(layer, numbers, offsets))
    same = own.trunk_checksum == others.trunk_checksum
    source = base / others.trunk.name if same else pack / own.trunk.name
    os.link(source, work / own.trunk.name)
    made = msgspec.structs.replace(own, layers=tuple(layers), files=tuple(files))
    return made, Shared(own.num_experts - len(differ), len(differ), same)


def _moved(layer: Layer, files: list[int], offsets: list[int]) -> Layer:
    return msgspec.structs.replace(layer, files=tuple(files), offsets=tuple(offsets))

"""A pack of the experts of another pack that are used most.

Records are copied as they are. Of the routers, the rows of the experts that go are left out: the
configuration says that there are fewer experts, as many in every layer, and a parameter whose shape
follows is cut alike. No weight is quantized anew.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from xxhash import xxh3_64_hexdigest

from expertd.packing.architecture import Architecture, read_architecture
from expertd.packing.checkpoint_files import CONFIG_NAME, read_config
from expertd.packing.early import check_destination, partial_of
from expertd.packing.finished_files import file_checksum, flush
from expertd.packing.side_files import find_side_files
from expertd.traces.usage import Usage
from expertstore.errors import InvalidInputError, PackError
from expertstore.pack.manifest import (
    MANIFEST_NAME,
    TRUNK_NAME,
    Layer,
    Manifest,
    PackFile,
    encode_manifest,
    read_manifest,
)
from expertstore.pack.tensor_file import TensorEntry, build_header, read_header, read_into

_NUM_EXPERTS = re.compile(r"^(?!.*(shared|_per_|zero|active)).*experts$")
"""Fields of a configuration that say how many experts a layer has."""
_CHUNK_BYTES = 16 << 20
_INTEGERS = ("I64", "I32", "I16", "I8", "U8")


def choose_kept(manifest: Manifest, usage: Usage, share: float, groups: int = 1) -> list[list[int]]:
    """The experts of each layer of ``manifest`` that are kept, as many in every layer.

    ``share`` of them, 0 to 1; with ``groups`` as many of each. Raises InvalidInputError if that is
    less than a token uses, or the usage is another model's.
    """
    sizes = {layer.layer: layer.num_experts for layer in manifest.layers}
    traced = {
        layer: len(scores) for layer, scores in zip(usage.layer_ids, usage.scores, strict=True)
    }
    if traced != sizes:
        raise InvalidInputError(
            "The trace is of another model: it has "
            f"{_sizes(traced)}, and the pack {_sizes(sizes)}; record one of this pack."
        )
    if len({*sizes.values()}) > 1:
        raise InvalidInputError(
            f"The pack has {_sizes(sizes)}, and only packs with as many experts in every layer can "
            "be pruned."
        )
    num_experts = manifest.layers[0].num_experts
    num_kept = round(share * num_experts / groups) * groups
    used = max(layer.experts_per_token for layer in manifest.layers)
    if not used <= num_kept < num_experts:
        raise InvalidInputError(
            f"--keep-experts {share:g} keeps {num_kept} of {num_experts} experts, of which a token "
            f"uses {used}; give {used / num_experts:.3g} to less than 1."
        )
    return [usage.most_used(layer.layer, num_kept, groups) for layer in manifest.layers]


def _sizes(sizes: Mapping[int, int]) -> str:
    nums = sorted({*sizes.values()})
    return f"{len(sizes)} layers of {' and '.join(map(str, nums))} experts"


def prune(
    source: Path,
    destination: Path,
    usage: Usage,
    share: float,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Makes the pack ``destination`` of ``source`` with ``share`` of its experts.

    ``on_progress`` hears how many bytes of how many are written. Raises PackError,
    CheckpointError if its configuration cannot be read, and as :func:`choose_kept`.
    """
    check_destination(destination, force=force)
    partial = partial_of(destination)
    if partial.exists():
        raise PackError(f"{partial} is the work of a packing; finish that, or remove it.")
    manifest = read_manifest(source).manifest
    config = read_config(source)
    whole = read_architecture(source)
    kept = choose_kept(manifest, usage, share, _num_groups(whole))
    try:
        folder = partial / "pack"
        folder.mkdir(parents=True)
        try:
            _copy_side_files(source, folder)
            for table in manifest.tables:
                shutil.copyfile(source / table.file, folder / table.file)
            for table in manifest.tables:
                _link(source / table.file, folder / table.file)
            _write_config(config, len(kept[0]), whole, folder)
            few = read_architecture(folder)
            made = _write(source, folder, manifest, kept, _cuts(source, whole, few), on_progress)
            (folder / MANIFEST_NAME).write_bytes(encode_manifest(made))
            for path in (*folder.iterdir(), folder):
                flush(path)
            if os.path.lexists(destination):
                destination.rename(partial / "replaced")
            folder.rename(destination)
            flush(destination.parent)
        finally:
            shutil.rmtree(partial)
    except OSError as error:
        raise PackError(
            f"{error.filename or destination} cannot be used: {error.strerror}."
        ) from error


def _num_groups(architecture: Architecture) -> int:
    """Of neighbouring experts, of which a router first chooses some."""
    config = architecture.model.config.get_text_config()
    groups = getattr(config, "n_group", None)
    return groups if isinstance(groups, int) and groups > 1 else 1


def _copy_side_files(source: Path, folder: Path) -> None:
    for file in find_side_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _link(source: Path, target: Path) -> None:
    """One file in both packs, which never change; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_config(
    config: Mapping[str, Any], num_kept: int, whole: Architecture, folder: Path
) -> None:
    """Raises PackError if nothing in it says how many experts a layer has."""
    num_experts = whole.experts[0].num_experts
    changed = 0

    def with_fewer(part: Any) -> Any:  # noqa: ANN401 - of any JSON
        nonlocal changed
        if not isinstance(part, dict):
            return part
        made = {}
        for name, value in part.items():
            if _NUM_EXPERTS.match(name) and value == num_experts:
                changed += 1
                made[name] = num_kept
            else:
                made[name] = with_fewer(value)
        return made

    few = with_fewer(config)
    if not changed:
        raise PackError(
            f"{folder / CONFIG_NAME} has no field that says that a layer has {num_experts} "
            "experts, so that this architecture cannot be pruned."
        )
    (folder / CONFIG_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(few), indent=2))


def _cuts(source: Path, whole: Architecture, few: Architecture) -> dict[str, tuple[int, int]]:
    """The trunk's tensors that have an element for each expert: the layer, and the dimension.

    Raises PackError where an expert is meant in a way that this does not see.
    """
    num_experts, num_kept = whole.experts[0].num_experts, few.experts[0].num_experts
    unknown = PackError(
        f"{source} is of the architecture {whole.name}, whose routers are not built of an element "
        "for each expert, so that it cannot be pruned."
    )
    if any(module.num_experts != num_kept for module in few.experts):
        raise unknown
    mapping = get_model_conversion_mapping(whole.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    before, after = whole.model.state_dict(), few.model.state_dict()
    blocks = {module.name.rpartition(".")[0]: module.layer for module in whole.experts}
    cuts: dict[str, tuple[int, int]] = {}
    for name, entry in _trunk_entries(source).items():
        target, _ = rename_source_key(
            name, renamings, converters, whole.model.base_model_prefix, before
        )
        if target not in before and name in before:
            target = name
        layer = next((blocks[block] for block in blocks if target.startswith(f"{block}.")), None)
        if target not in before:
            continue
        old, new = tuple(before[target].shape), tuple(after[target].shape)
        if layer is not None and entry.dtype in _INTEGERS and not name.endswith(".q"):
            raise unknown  # They may be numbers of experts.
        if old == new:
            continue
        places = [at for at, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        if layer is None or len(places) != 1 or entry.shape != old:
            raise unknown
        if (old[places[0]], new[places[0]]) != (num_experts, num_kept):
            raise unknown
        cuts[name] = layer, places[0]
    if {layer for layer, _ in cuts.values()} != {module.layer for module in whole.experts}:
        raise unknown
    return cuts


def _trunk_entries(source: Path) -> dict[str, TensorEntry]:
    path = source / TRUNK_NAME
    try:
        return read_header(path)
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise PackError(f"{path} cannot be used: {error}; copy or make the pack again.") from error


def _write(
    source: Path,
    folder: Path,
    manifest: Manifest,
    kept: Sequence[Sequence[int]],
    cuts: Mapping[str, tuple[int, int]],
    on_progress: Callable[[int, int], None],
) -> Manifest:
    """Writes all weights; the manifest of what is there then."""
    layers: list[Layer] = []
    files: list[PackFile] = []
    sizes = [manifest.layouts[layer.layout].record_bytes for layer in manifest.layers]
    total = sum(len(each) * size for each, size in zip(kept, sizes, strict=True))
    done = 0
    for layer, chosen, size in zip(manifest.layers, kept, sizes, strict=True):
        name = f"experts-{len(files):05d}.safetensors"
        header = build_header(
            [(f"layers.{layer.layer}.experts.{new}", "U8", (size,)) for new in range(len(chosen))]
        )
        with (folder / name).open("wb") as out:
            out.write(header)
            for old in chosen:
                out.write(_record(source, manifest, layer, old, size))
                done += size
                on_progress(done, total)
            num_bytes = out.tell()
        offsets = tuple(len(header) + new * size for new in range(len(chosen)))
        layers.append(
            msgspec.structs.replace(
                layer,
                num_experts=len(chosen),
                files=(len(files),) * len(chosen),
                offsets=offsets,
                checksums=tuple(layer.checksums[old] for old in chosen),
            )
        )
        files.append(PackFile(name=name, num_bytes=num_bytes))
    order = {layer.layer: list(chosen) for layer, chosen in zip(layers, kept, strict=True)}
    trunk, checksum = _write_trunk(source, folder, manifest, cuts, order)
    return msgspec.structs.replace(
        manifest,
        layers=tuple(layers),
        files=tuple(files),
        trunk=trunk,
        trunk_checksum=checksum,
    )


def _record(source: Path, manifest: Manifest, layer: Layer, expert: int, size: int) -> bytearray:
    path = source / manifest.files[layer.files[expert]].name
    data = bytearray(size)
    with path.open("rb") as file:
        try:
            read_into(file.fileno(), memoryview(data), layer.offsets[expert])
        except EOFError as error:
            raise PackError(f"{path} is truncated; copy or make the pack again.") from error
    if xxh3_64_hexdigest(data) != layer.checksums[expert]:
        raise PackError(
            f"Expert {expert} of layer {layer.layer} in {path} fails its checksum; copy or make "
            "the pack again."
        )
    return data


def _write_trunk(
    source: Path,
    folder: Path,
    manifest: Manifest,
    cuts: Mapping[str, tuple[int, int]],
    kept: Mapping[int, Sequence[int]],
) -> tuple[PackFile, str]:
    entries = _trunk_entries(source)
    shapes = {}
    for name, entry in entries.items():
        shape = list(entry.shape)
        if name in cuts:
            layer, place = cuts[name]
            shape[place] = len(kept[layer])
        shapes[name] = tuple(shape)
    header = build_header([(name, entry.dtype, shapes[name]) for name, entry in entries.items()])
    path = folder / TRUNK_NAME
    with path.open("wb") as out, (source / TRUNK_NAME).open("rb") as file:
        out.write(header)
        for name, entry in entries.items():
            file.seek(entry.offset)
            if name not in cuts:
                _copy(file, out, entry.num_bytes)
                continue
            layer, place = cuts[name]
            data = np.frombuffer(file.read(entry.num_bytes), np.uint8).reshape(*entry.shape, -1)
            out.write(data.take(list(kept[layer]), axis=place).tobytes())
        num_bytes = out.tell()
    return PackFile(name=manifest.trunk.name, num_bytes=num_bytes), file_checksum(path)


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        chunk = source.read(min(num_bytes, _CHUNK_BYTES))
        if not chunk:
            raise PackError(f"{source.name} is truncated; copy or make the pack again.")
        target.write(chunk)
        num_bytes -= len(chunk)

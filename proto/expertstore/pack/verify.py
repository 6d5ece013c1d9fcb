"""Every byte of a pack read again and held against its checksums."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xxhash import xxh3_64

from expertstore.errors import RecordLostError
from expertstore.pack.manifest import Manifest, Table
from expertstore.pack.reader import PackReader, RecordPlace
from expertstore.pack.table import is_sound
from expertstore.pack.tensor_file import read_header

CHUNK_BYTES = 1 << 20
"""Of the trunk, which is read so much at a time: what a core keeps in its cache."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file, or with one record in it."""

    file: str
    reason: str
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Verification:
    """What was read, and all that is damaged."""

    num_records: int
    num_bytes: int
    damages: tuple[Damage, ...]


def verify(
    pack: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Checks all records, their places in the files, the tables, and the trunk.

    ``on_progress`` gets the bytes read so far, and all. Raises :class:`PackError` if
    ``pack`` is not a pack.
    """
    with PackReader(pack) as reader:
        manifest = reader.manifest
        damages = [Damage(damage.path.name, damage.reason) for damage in reader.damaged_files]
        total = manifest.expert_bytes + manifest.table_bytes + manifest.trunk.num_bytes
        done = 0
        for place in reader.places():
            on_progress(done, total)
            try:
                reader.read_record(place.layer, place.expert)
            except RecordLostError as error:
                reason = str(error).split(" is lost: ")[1].split(";")[0]
                damages.append(Damage(place.path.name, reason, place.layer, place.expert))
            done += place.num_bytes
        for table in manifest.tables:
            damages += check_table_file(pack, table, partial(_further, on_progress, done, total))
            done += table.num_bytes
        damages += _check_headers(reader, {damage.file for damage in damages})
        damages += check_trunk(pack, manifest, lambda read: on_progress(done + read, total))
        on_progress(total, total)
        return Verification(manifest.num_experts, total, tuple(damages))


def _check_headers(reader: PackReader, known: set[str]) -> list[Damage]:
    """Whether safetensors' own readers find the records where the manifest has them."""
    by_file: dict[Path, list[RecordPlace]] = {}
    for place in reader.places():
        by_file.setdefault(place.path, []).append(place)
    damages = []
    for path, places in by_file.items():
        if not path.exists():
            continue  # known already
        try:
            tensors = read_header(path)
        except (OSError, ValueError) as error:
            damages.append(Damage(path.name, f"its header cannot be read: {error}"))
            continue
        for place in places:
            entry = tensors.get(f"layers.{place.layer}.experts.{place.expert}")
            if entry is None or (entry.offset, entry.num_bytes) != (place.offset, place.num_bytes):
                damages.append(
                    Damage(path.name, "its header has it elsewhere", place.layer, place.expert)
                )
    return damages


def check_table_file(
    pack: Path, table: Table, on_progress: Callable[[int], None] = lambda read: None
) -> list[Damage]:
    """Reads a table's file; what is wrong with it, at most one thing.

    ``on_progress`` gets the bytes read so far.
    """
    wrong: list[int] = []
    block = memoryview(bytearray(table.block_bytes))
    try:
        with (pack / table.file).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != table.num_bytes:
                return [Damage(table.file, f"it has {size} of {table.num_bytes} bytes")]
            file.seek(table.offset)
            for number in range(table.num_blocks):
                file.readinto(block)
                if not is_sound(block, number):
                    wrong.append(number)
                on_progress(table.offset + (number + 1) * table.block_bytes)
    except OSError as error:
        return [Damage(table.file, str(error.strerror))]
    if not wrong:
        return []
    return [
        Damage(
            table.file,
            f"the checksums of {len(wrong)} blocks are wrong, the first of rows from "
            f"{wrong[0] * table.rows_per_block} on",
        )
    ]


def _further(
    on_progress: Callable[[int, int], None], done: int, total: int, num_bytes: int
) -> None:
    on_progress(done + num_bytes, total)


def check_trunk(
    pack: Path, manifest: Manifest, on_progress: Callable[[int], None] = lambda read: None
) -> list[Damage]:
    """Reads the trunk of ``pack``; what is wrong with it, at most one thing.

    ``on_progress`` gets the bytes read so far.
    """
    name = manifest.trunk.name
    state = xxh3_64()
    num_bytes = 0
    chunk = memoryview(bytearray(CHUNK_BYTES))
    try:
        with (pack / name).open("rb", buffering=0) as file:
            while read := file.readinto(chunk):
                state.update(chunk[:read])
                num_bytes += read
                on_progress(num_bytes)
    except OSError as error:
        return [Damage(name, str(error.strerror))]
    if num_bytes != manifest.trunk.num_bytes:
        return [Damage(name, f"it has {num_bytes} of {manifest.trunk.num_bytes} bytes")]
    if state.hexdigest() != manifest.trunk_checksum:
        return [Damage(name, "its checksum is wrong")]
    return []

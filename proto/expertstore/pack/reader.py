"""A pack's records, found and read with their checksums checked."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from xxhash import xxh3_64_hexdigest

from expertstore.errors import NotFoundError, RecordLostError
from expertstore.pack.manifest import Fingerprinted, Layer, PackFile, read_manifest
from expertstore.pack.tensor_file import read_fully


@dataclass(frozen=True)
class RecordPlace:
    """Where a record lies on disk, and the checksum of its bytes."""

    layer: int
    expert: int
    path: Path
    offset: int
    num_bytes: int
    checksum: str


@dataclass(frozen=True)
class FileDamage:
    """A file that is missing, unreadable or not of the size in the manifest."""

    path: Path
    reason: str


class PackReader:
    """An open pack. Close it, or use it as a context manager; threads may share it.

    A damaged file is no reason to refuse a pack: records in the part that is there are
    served, others are a :class:`RecordLostError` when they are read. ``damaged_files`` has
    what opening found.
    """

    def __init__(self, path: Path) -> None:
        """Raises :class:`PackError` if ``path`` is not a pack, or of another version."""
        self.path = path
        self.pack: Fingerprinted = read_manifest(path)
        self.manifest = self.pack.manifest
        self.damaged_files: list[FileDamage] = []
        self._layers: dict[int, Layer] = {layer.layer: layer for layer in self.manifest.layers}
        self._fds: dict[str, int] = {}
        for file in self.manifest.files:
            self._open(file)

    def __repr__(self) -> str:
        return (
            f"PackReader({self.path}, {self.manifest.num_experts} experts, "
            f"{len(self.damaged_files)} damaged files)"
        )

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

    def places(self) -> Iterator[RecordPlace]:
        """All records, in the order of the directory's entries."""
        for layer in self.manifest.layers:
            for expert in range(layer.num_experts):
                yield self.locate(layer.layer, expert)

    def locate(self, layer: int, expert: int) -> RecordPlace:
        """Where the record of that expert lies. Raises :class:`NotFoundError`."""
        found = self._layers.get(layer)
        if found is None or not 0 <= expert < found.num_experts:
            raise NotFoundError(f"{self.path} has no expert {expert} in layer {layer}.")
        return RecordPlace(
            layer=layer,
            expert=expert,
            path=self.path / self.manifest.files[found.files[expert]].name,
            offset=found.offsets[expert],
            num_bytes=self.manifest.layouts[found.layout].record_bytes,
            checksum=found.checksums[expert],
        )

    def read_record(self, layer: int, expert: int) -> bytearray:
        """The record's bytes, verified. Raises :class:`NotFoundError`, `RecordLostError`."""
        place = self.locate(layer, expert)
        try:
            if place.path.name not in self._fds:
                raise FileNotFoundError(2, os.strerror(2))
            data = read_fully(self._fds[place.path.name], place.num_bytes, place.offset)
        except EOFError as error:
            raise self._lost(place, "the file ends before it") from error
        except OSError as error:
            raise self._lost(place, str(error.strerror)) from error
        if xxh3_64_hexdigest(data) != place.checksum:
            raise self._lost(place, "its checksum is wrong")
        return data

    def _open(self, file: PackFile) -> None:
        path = self.path / file.name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._fds[file.name] = fd
            num_bytes = os.fstat(fd).st_size
        except OSError as error:
            self.damaged_files.append(FileDamage(path, str(error.strerror)))
            return
        if num_bytes != file.num_bytes:
            self.damaged_files.append(
                FileDamage(path, f"it has {num_bytes} of {file.num_bytes} bytes")
            )

    @staticmethod
    def _lost(place: RecordPlace, reason: str) -> RecordLostError:
        return RecordLostError(
            f"Expert {place.expert} of layer {place.layer} in {place.path} is lost: {reason}; "
            "copy or make the pack again.",
            experts=[(place.layer, place.expert)],
        )

"""The directory in which packs lie unless a user says otherwise, and what is in it."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from expertd.packing.early import GGUF_FOLDER, HUB_FOLDER, PARTIAL_SUFFIX, partial_of
from expertstore.errors import ConfigError, PackError
from expertstore.pack.manifest import MANIFEST_NAME, read_manifest


@dataclass(frozen=True)
class ShelvedPack:
    """A pack in the directory, or what there is of one."""

    path: Path
    state: str
    """``whole``, ``begun`` (an interrupted packing), or why it cannot be read."""
    num_bytes: int
    """On the disk, what is left of an interrupted packing included."""
    scheme: str = ""
    architecture: str = ""
    expert_bytes: int = 0
    """Of the records: what RAM for all experts takes."""

    @property
    def name(self) -> str:
        """Its name in the directory."""
        return self.path.name


def list_packs(directory: Path) -> list[ShelvedPack]:
    """What is in it, by name. Raises :class:`ConfigError` if it cannot be read."""
    try:
        entries = sorted(entry for entry in directory.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{directory} cannot be read: {error.strerror}.") from error
    places = {
        entry.with_name(entry.name.removesuffix(PARTIAL_SUFFIX))
        for entry in entries
        if (entry / MANIFEST_NAME).is_file()
        or (entry.name.endswith(PARTIAL_SUFFIX) and _is_begun(entry))
    }
    return [_look(place) for place in sorted(places)]


def find_pack(directory: Path, name: str) -> ShelvedPack:
    """The pack of that name, or at that path. Raises :class:`ConfigError` if there is none."""
    place = Path(name).absolute() if "/" in name else directory / name
    is_whole = (place / MANIFEST_NAME).is_file()
    if place.is_symlink() or not (is_whole or _is_begun(partial_of(place))):
        raise ConfigError(f"{place} is no pack; `expertd packs` lists those that are there.")
    return _look(place)


def remove_pack(pack: ShelvedPack) -> None:
    """Removes it with what is left of its packing. Raises :class:`PackError`."""
    try:
        if (pack.path / MANIFEST_NAME).exists():
            # Without its manifest it is no pack any more, whatever happens next.
            (pack.path / MANIFEST_NAME).unlink()
            shutil.rmtree(pack.path)
        if partial_of(pack.path).exists():
            shutil.rmtree(partial_of(pack.path))
    except OSError as error:
        raise PackError(f"{error.filename} cannot be removed: {error.strerror}.") from error


def _look(place: Path) -> ShelvedPack:
    partial = partial_of(place)
    num_bytes = _disk_bytes(place) + _disk_bytes(partial)
    if not (place / MANIFEST_NAME).is_file():
        return ShelvedPack(place, "begun", num_bytes)
    try:
        manifest = read_manifest(place).manifest
    except PackError as error:
        return ShelvedPack(place, str(error), num_bytes)
    return ShelvedPack(
        place,
        "whole; another is begun" if partial.exists() else "whole",
        num_bytes,
        manifest.scheme,
        manifest.architecture,
        manifest.expert_bytes,
    )


def _is_begun(partial: Path) -> bool:
    return (partial / "journal").is_file() or any(
        (partial / folder).is_dir() for folder in (HUB_FOLDER, GGUF_FOLDER)
    )


def _disk_bytes(place: Path) -> int:
    """What the files below take; of a link, nothing."""
    found = 0
    for file in place.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            found += 512 * file.lstat().st_blocks
    return found

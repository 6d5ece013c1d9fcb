"""The adapters of this host by name, each over the model that it is for.

A directory for each name: the adapter's two files, as peft writes them, and ``base.json``. A name
is there as a whole or not at all; whoever has its files open keeps them after it is gone.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from expertstore.adapter import FILES, AdapterFiles, read_adapter
from expertstore.errors import AdapterError, NotFoundError, PackError
from expertstore.pack.manifest import MANIFEST_NAME, Manifest, read_manifest
from expertstore.pack.place import packs_directory
from expertstore.pack.tensor_file import read_header

ADAPTERS_VARIABLE = "EXPERTD_ADAPTERS"
BASE_NAME = "base.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Base(msgspec.Struct, frozen=True):
    """``base.json``: the model, by the name that the daemon has it under."""

    model: Annotated[str, Meta(min_length=1)]


class KnownAdapter(msgspec.Struct, frozen=True):
    """An adapter of this host."""

    name: str
    model: str
    directory: Path

    @property
    def num_bytes(self) -> int:
        """Of its files; 0 if they are gone."""
        try:
            return sum((self.directory / name).stat().st_size for name in FILES)
        except OSError:
            return 0


def adapters_directory() -> Path:
    """``$EXPERTD_ADAPTERS``, else ``adapters`` beside the packs. Raises ConfigError."""
    if named := os.environ.get(ADAPTERS_VARIABLE):
        return Path(named).absolute()
    return packs_directory().parent / "adapters"


def named_adapter(name: str | None) -> str | None:
    """The directory of the adapter of that name, or ``name`` as it is, a directory's."""
    if name is None or Path(name).exists() or not _NAME.fullmatch(name):
        return name
    named = adapters_directory() / name
    return str(named) if (named / BASE_NAME).is_file() else name


def list_adapters(place: Path) -> list[KnownAdapter]:
    """Those in the directory ``place``, by name; what is damaged is left out."""
    found = []
    try:
        entries = sorted(place.iterdir())
    except OSError:
        return []
    for directory in entries:
        if not _NAME.fullmatch(directory.name):
            continue
        try:
            base = msgspec.json.decode((directory / BASE_NAME).read_bytes(), type=Base)
        except (OSError, msgspec.MsgspecError):
            continue
        found.append(KnownAdapter(directory.name, base.model, directory))
    return found


def load_adapter(place: Path, name: str, source: Path, model: str, pack: Path) -> KnownAdapter:
    """Keeps a copy of the adapter in ``source`` as ``name``, in the place of one of that name.

    Raises AdapterError for a name that cannot be one, for what is no adapter that is known, or one
    of another base than ``pack``, which ``model`` serves; PackError if that cannot be read.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name; take letters, digits, dots, dashes."
        )
    if (packs_directory() / name / MANIFEST_NAME).is_file() or name == model:
        raise AdapterError(f"{name} is the name of a model; give the adapter another.")
    files = read_adapter(source)
    check_base(files, pack)
    work, directory = place / f".{name}.partial", place / name
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for each in FILES:
            shutil.copyfile(source / each, work / each)
        (work / BASE_NAME).write_bytes(msgspec.json.encode(Base(model)))
        if directory.exists():
            replaced = place / f".{name}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            directory.rename(replaced)
            work.rename(directory)
            shutil.rmtree(replaced)
        else:
            work.rename(directory)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise AdapterError(
            f"The adapter cannot be kept in {place}: {error.strerror} ({error.filename})."
        ) from error
    return KnownAdapter(name, model, directory)


def unload_adapter(place: Path, name: str) -> None:
    """Raises NotFoundError if there is none of that name, and AdapterError if it cannot go."""
    known = {each.name for each in list_adapters(place)}
    if name not in known:
        raise NotFoundError(
            f"There is no adapter {name!r}; name one of: {', '.join(sorted(known)) or 'none'}."
        )
    try:
        shutil.rmtree(place / name)
    except OSError as error:
        raise AdapterError(f"{place / name} cannot be removed: {error.strerror}.") from error


def check_base(files: AdapterFiles, pack: Path) -> None:
    """By what a pack tells without its weights; a worker has the last word.

    Raises AdapterError if a matrix that the adapter adds to has another shape, PackError.
    """
    shapes = _trunk_shapes(pack, read_manifest(pack).manifest)
    for part in files.parts:
        shape = shapes.get(f"{part.module}.weight")
        has = part.b.shape[0], part.a.shape[1]
        if shape is not None and shape != has:
            raise AdapterError(
                f"{files.directory} is of another base than {pack.name}: {part.module} is "
                f"{has[0]} x {has[1]} there, and {shape[0]} x {shape[1]} in the pack."
            )


def _trunk_shapes(pack: Path, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    path = pack / manifest.trunk.name
    try:
        plain = {name: entry.shape for name, entry in read_header(path).items()}
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise PackError(f"{path} cannot be used: {error}; copy or make the pack again.") from error
    quantized: dict[str, tuple[int, ...]] = {
        each.name: (each.matrix.out_features, each.matrix.in_features)
        for each in manifest.trunk_quantized
    }
    return {name: shape for name, shape in plain.items() if len(shape) == 2} | quantized

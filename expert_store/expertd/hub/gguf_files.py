"""Which files of a repository are the model in GGUF that a user named, and how they come here."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from expertd.hub.repository import HubFile, Repository
from expertd.packing.checkpoint_files import INDEX_NAME, SINGLE_NAME
from expertd.packing.gguf.names import SUFFIX, VISION, model_name, part_names
from expertstore.errors import CheckpointError, PackError
from expertstore.sizes import format_bytes


def find_gguf(repository: Repository) -> list[HubFile]:
    """The file, or all parts of it; none if safetensors are meant. Raises CheckpointError."""
    reference, names = repository.reference, repository.files
    if reference.file:
        return [_need(repository, name) for name in _parts(reference.file)]
    if not reference.variant and {SINGLE_NAME, INDEX_NAME} & names.keys():
        return []
    models = {
        _model(name): name
        for name in sorted(names, reverse=True)
        if name.endswith(SUFFIX) and VISION not in name.lower()
    }
    if not models and not reference.variant:
        return []
    wanted = [name for model, name in models.items() if _fits(model, reference.variant)]
    if len(wanted) != 1:
        there = ", ".join(sorted(model.rpartition("/")[2] for model in models)) or "none"
        raise CheckpointError(
            f"{reference} is {len(wanted) or 'no'} model{'s' * (len(wanted) > 1)} in GGUF; name one"
            f" as hf://{reference.name}/FILE.gguf or ORG/NAME:VARIANT (there are {there})."
        )
    return [_need(repository, name) for name in _parts(wanted[0])]


def fetch_gguf(
    repository: Repository,
    files: list[HubFile],
    folder: Path | None,
    on_bytes: Callable[[int], None],
    *,
    place: Path,
) -> Path:
    """Fetches ``files`` into ``folder``, or the hub's cache on this host; returns the first.

    ``place``: a directory on the disk of the pack. Raises CheckpointError and PackError.
    """
    total = sum(file.num_bytes for file in files)
    free = shutil.disk_usage(place).free + _num_bytes_in(folder)
    if folder is not None and free < total:
        raise PackError(
            f"The disk of {place} has {format_bytes(free)} free, and the files take "
            f"{format_bytes(total)}, beside the pack; free some, or choose another place."
        )
    found = [repository.download(file.name, folder, on_bytes) for file in files]
    return found[0]


def _num_bytes_in(folder: Path | None) -> int:
    if folder is None or not folder.is_dir():
        return 0
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def _model(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(model_name(Path(path.name))))


def _parts(name: str) -> list[str]:
    path = PurePosixPath(name)
    return [str(path.with_name(part)) for part in part_names(path.name)]


def _fits(model: str, variant: str) -> bool:
    """Whether the model's name ends with the variant, after what is no letter and no digit."""
    if not variant:
        return True
    return re.search(rf"(?i)(^|[^a-z0-9]){re.escape(variant)}$", model) is not None


def _need(repository: Repository, name: str) -> HubFile:
    if name not in repository.files:
        raise CheckpointError(
            f"{repository.reference} lacks {name}; look at the repository's files on its page."
        )
    return repository.files[name]

"""Names of GGUF files. For who only looks at paths: without numpy and the gguf package."""

import re
from pathlib import Path

from expertd.packing.checkpoint_files import INDEX_NAME, SINGLE_NAME
from expertstore.errors import CheckpointError

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
VISION = "mmproj"
"""In the names of files that hold the part of a model that sees."""


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is named as a GGUF file is."""
    return path.suffix.lower() == SUFFIX


def model_name(file: Path) -> str:
    """The file's name without what tells a part, and without its suffix."""
    part = _PART.fullmatch(file.name)
    return part["stem"] if part else file.stem


def part_names(name: str) -> list[str]:
    """The names of all parts of the model of which ``name`` is one, in order."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    count = int(part["count"])
    return [f"{part['stem']}-{1 + number:05d}-of-{count:05d}.gguf" for number in range(count)]


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or that is the model in the directory ``path``.

    None if it is neither: a directory with safetensors is those. Raises :class:`CheckpointError`
    if the directory has several models, or the file is not there.
    """
    if is_gguf(path) and not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} is not there; download it.")
        return path
    if not path.is_dir() or any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        return None
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if VISION not in file.name.lower())
    models = {model_name(file): file for file in reversed(files)}
    if len(models) > 1:
        raise CheckpointError(
            f"{path} has several models in GGUF ({', '.join(sorted(models))}); give the file of "
            "one."
        )
    return next(iter(models.values()), None)

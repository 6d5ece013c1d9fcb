"""What ``--model`` of ``expert-run advise`` names; without torch, so mistakes are told at once."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from expertd.packing.checkpoint_files import CONFIG_NAME, read_config
from expertd.packing.shapes import shape_config
from expertstore.errors import InvalidInputError
from expertstore.pack.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Named:
    """A model that is there to be looked at."""

    name: str
    is_pack: bool = False
    config: bytes | None = None
    """Its ``config.json``, if there is no directory that has it."""


def find_named(text: str) -> Named:
    """The pack, the checkpoint, the ``config.json`` or the shape that ``text`` names.

    Raises InvalidInputError (CheckpointError) in a sentence that says what to give.
    """
    path = Path(text)
    try:
        found = _look_at(path)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}.") from error
    if found is not None:
        return found
    # A hub's name has its owner before it.
    config = shape_config(text.rpartition("/")[2].lower(), published=True)
    return Named(text, config=msgspec.json.encode(config))


def _look_at(path: Path) -> Named | None:
    """What lies there, or None. Raises OSError, and InvalidInputError for what is no model."""
    if (path / MANIFEST_NAME).is_file():
        return Named(path.resolve().name, is_pack=True)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise InvalidInputError(
                f"{path} is neither a pack nor a checkpoint, for it has no {MANIFEST_NAME} and no "
                f"{CONFIG_NAME}; give another directory, or a shape such as mixtral-8x7b."
            )
        read_config(path)
        return Named(path.resolve().name)
    return Named(path.stem, config=path.read_bytes()) if path.is_file() else None

"""Where packs lie that a user names without a path."""

import os
from pathlib import Path

from expertstore.errors import ConfigError
from expertstore.pack.manifest import MANIFEST_NAME

PACKS_VARIABLE = "EXPERTD_PACKS"


def packs_directory() -> Path:
    """``$EXPERTD_PACKS``, else ``$XDG_DATA_HOME/expertd/packs``; it need not be there.

    Raises :class:`ConfigError` if there is neither, nor a home directory.
    """
    if named := os.environ.get(PACKS_VARIABLE):
        return Path(named).absolute()
    if base := os.environ.get("XDG_DATA_HOME"):
        return Path(base).absolute() / "expertd/packs"
    try:
        return Path.home() / ".local/share/expertd/packs"
    except RuntimeError as error:
        raise ConfigError(
            f"There is no home directory to put packs in; name a directory in {PACKS_VARIABLE}."
        ) from error


def named_pack(path: Path) -> Path:
    """The pack of that name in :func:`packs_directory`, or ``path`` as it is.

    What ``path`` leads to from here goes first.
    """
    if len(path.parts) != 1 or path.exists():
        return path
    try:
        named = packs_directory() / path
    except ConfigError:
        return path
    return named if (named / MANIFEST_NAME).is_file() else path

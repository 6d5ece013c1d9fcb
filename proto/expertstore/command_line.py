"""Commands that a message offers for copying into a shell."""

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """``words`` as one command that a shell takes apart into just these again.

    A :class:`~pathlib.Path` that begins with a dash is written so that no program takes it for an
    option.
    """
    return shlex.join(
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    )


def serve_command(name: str, pack: Path, ram_bytes: int, *where: str | Path) -> str:
    """What serves ``pack`` under that name, in a budget rounded up to whole MiB.

    ``where`` is :func:`expertstore.socket_directory.where_to_serve`'s.
    """
    budget = f"{-(-ram_bytes >> 20)}MiB"
    return command("expertd", "serve", *where, "--ram", budget, "--model", f"{name}={pack}")

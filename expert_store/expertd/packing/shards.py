"""Files of a checkpoint that come while it is packed, and go again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol


class Shards(Protocol):
    """Where a checkpoint is a directory whose files are here only for a time."""

    @property
    def fingerprint(self) -> str:
        """The same for the same bytes."""

    def is_here(self, file: Path) -> bool:
        """Whether the file's bytes can be read from it; of one that is not only its header can."""

    def read(self, file: Path, offset: int, count: int) -> bytes:
        """Some bytes of a file that is not here. Raises CheckpointError."""

    def fetch(self, files: Iterable[Path]) -> None:
        """Begins to bring them here in this order, some ahead of the last that was waited for."""

    def wait(self, file: Path) -> None:
        """Returns once the file is here. Raises CheckpointError."""

    def drop(self, file: Path) -> None:
        """Nobody will read the file again."""

"""What of a pack is written, so that an interrupted packing goes on where it was."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from expertstore.errors import PackError


class Journal:
    """A file with a line that says what is being packed, then one line per finished step.

    The first line is ``key``; a journal with another one is of another packing. A step's line
    is written after its data is on the disk, so a line that is there speaks the truth even
    after a power failure; a torn last line is dropped. The open journal is locked: two
    processes never write one pack.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Opens or begins the journal. Raises OSError, and PackError if it is in use."""
        self.key = key
        self.done: dict[int, str] = {}
        """Checksums of the finished steps, by step."""
        self._pending: list[int] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PackError(
                    f"Another expertd is writing to {path.parent}; wait for it or stop it."
                ) from error
            self.matches = self._load(path.read_bytes())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Forgets what is written, and begins anew with the journal's key."""
        self.done.clear()
        self._pending.clear()
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{self.key}\n".encode())
        os.fsync(self._fd)
        self.matches = True

    def add(self, step: int, checksum: str, *, lasting: bool = True) -> None:
        """Notes a finished step; :meth:`commit` makes it last, or another run does it again."""
        self.done[step] = checksum
        if lasting:
            self._pending.append(step)

    def commit(self) -> list[int]:
        """Writes the steps that were added, and returns them; their data must be on the disk."""
        written, self._pending = self._pending, []
        if written:
            lines = "".join(f"{step} {self.done[step]}\n" for step in written)
            os.write(self._fd, lines.encode())
            os.fsync(self._fd)
        return written

    def close(self) -> None:
        """Closes the file and gives up the lock; twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _load(self, data: bytes) -> bool:
        """Takes over the finished steps. False if the journal is new or of another packing."""
        *lines, torn = data.split(b"\n")
        if not lines or lines[0] != self.key.encode():
            return False
        for line in lines[1:]:
            step, _, checksum = line.decode(errors="replace").partition(" ")
            if not step.isdecimal() or len(checksum) != 16:
                return False
            self.done[int(step)] = checksum
        if torn:
            os.ftruncate(self._fd, len(data) - len(torn))
        return True

"""A limit on the memory of one process, page cache included: a control group of its own.

Both of the kernel's hierarchies serve, version 1 and 2; whoever may make a group in the one that
this process is in (root, or a user to whom it was delegated) may measure with it.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from expertstore.shared.control_groups import V1, V2, memory_groups

_GONE_SECONDS = 10.0


class NoLimitError(Exception):
    """Memory cannot be limited here; the message says what was tried."""


@dataclass(frozen=True)
class _Names:
    """Files of a group, and keys of its ``memory.stat``."""

    anonymous: str
    most: str


_NAMES = {V1: _Names("rss", "memory.max_usage_in_bytes"), V2: _Names("anon", "memory.peak")}


class MemoryLimit:
    """A group without processes and without a limit. Raises NoLimitError.

    A process joins by writing its number to :attr:`joined_by`, before it takes memory: what it has
    by then is not counted. :meth:`close` removes the group, once its processes have ended.
    """

    def __init__(self, name: str) -> None:
        groups = memory_groups()
        if not groups:
            raise NoLimitError("no hierarchy of control groups is mounted that counts memory")
        parent = groups[0].directory
        self._names, self._limit = _NAMES[groups[0].version], groups[0].version.limits[0]
        self._path = parent / f"{name}-{os.getpid()}"
        try:
            self._path.mkdir()
            if not (self._path / self._limit).exists():
                self._path.rmdir()
                raise NoLimitError(f"groups in {parent} do not limit memory")
        except OSError as error:
            raise NoLimitError(f"no group can be made in {parent}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def joined_by(self) -> Path:
        """The file that takes a process's number."""
        return self._path / "cgroup.procs"

    def anonymous_bytes(self) -> int:
        """What the group has that is no file's."""
        rows = (self._path / "memory.stat").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.split()[0] == self._names.anonymous)

    def most_bytes(self) -> int:
        """The most that the group had at a time, page cache included."""
        return int((self._path / self._names.most).read_text())

    def set(self, num_bytes: int) -> None:
        """From now on all of it together takes so much at most. Raises NoLimitError."""
        try:
            (self._path / self._limit).write_text(str(num_bytes))
        except OSError as error:
            raise NoLimitError(f"{self._path} takes no limit: {error.strerror}") from error

    def close(self) -> None:
        """Removes the group; twice is harmless."""
        deadline = time.monotonic() + _GONE_SECONDS
        while self._path.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                self._path.rmdir()
                return
            time.sleep(0.05)

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

_GONE_SECONDS = 10.0


class NoLimitError(Exception):
    """Memory cannot be limited here; the message says what was tried."""


@dataclass(frozen=True)
class _Names:
    """Files of a group, which differ by version."""

    limit: str
    anonymous: str
    most: str


_V1 = _Names("memory.limit_in_bytes", "rss", "memory.max_usage_in_bytes")
_V2 = _Names("memory.max", "anon", "memory.peak")


class MemoryLimit:
    """A group without processes and without a limit. Raises NoLimitError.

    A process joins by writing its number to :attr:`joined_by`, before it takes memory: what it has
    by then is not counted. :meth:`close` removes the group, once its processes have ended.
    """

    def __init__(self, name: str) -> None:
        parent, self._names = _own_group()
        self._path = parent / f"{name}-{os.getpid()}"
        try:
            self._path.mkdir()
            if not (self._path / self._names.limit).exists():
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
            (self._path / self._names.limit).write_text(str(num_bytes))
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


def _own_group() -> tuple[Path, _Names]:
    """The directory of the group that counts this process's memory."""
    groups = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        root, place = fields.split()[3:5]
        kind, _, options = rest.split()[:3]
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in groups:
            return _inside(Path(place), root, groups["memory"]), _V1
        if kind == "cgroup2" and "memory" not in groups and "" in groups:
            return _inside(Path(place), root, groups[""]), _V2
    raise NoLimitError("no hierarchy of control groups is mounted that counts memory")


def _inside(place: Path, root: str, group: str) -> Path:
    """Where ``group`` lies under a mount at ``place`` that shows ``root`` and what is below."""
    relative = os.path.relpath(group, root)
    return place if relative == "." or relative.startswith("..") else place / relative

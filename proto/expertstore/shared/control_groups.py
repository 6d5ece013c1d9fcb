"""The control groups that count this process's memory, of the kernel's versions 1 and 2.

A host may mount either hierarchy, or both (hybrid): then memory is counted by one of them, and a
group of the other has no limit. Nothing here fails: a group that cannot be read limits nothing.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Version(NamedTuple):
    """A hierarchy's files of a group, and keys of ``memory.stat``."""

    limits: tuple[str, ...]
    used: str
    file_cache: str
    of_ancestors: str | None
    """The smallest limit of the group and of those above it, also where no mount shows them."""
    reaches_down: str | None
    """Whether the group counts what those below it use; None: always."""


# memory.high: the kernel holds a process above it up rather than killing it, for ever if the
# memory is locked.
V2 = Version(("memory.max", "memory.high"), "memory.current", "inactive_file", None, None)
V1 = Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "hierarchical_memory_limit",
    "memory.use_hierarchy",
)


@dataclass(frozen=True)
class MemoryGroup:
    """A control group that holds this process, or one above it."""

    directory: Path
    version: Version

    @property
    def limit_bytes(self) -> int | None:
        """How much the group may have; None: as much as it likes."""
        found = [_number(_text(self.directory / name)) for name in self.version.limits]
        if self.version.of_ancestors is not None:
            found.append(self._stat(self.version.of_ancestors))
        return min((limit for limit in found if limit is not None), default=None)

    @property
    def used_bytes(self) -> int:
        """How much it has, without page cache that the kernel drops when memory is wanted."""
        used = _number(_text(self.directory / self.version.used)) or 0
        return max(0, used - (self._stat(self.version.file_cache) or 0))

    @property
    def counts_below(self) -> bool:
        """Whether its limit holds for the groups below it, too."""
        name = self.version.reaches_down
        return name is None or _text(self.directory / name).strip() != "0"

    def _stat(self, key: str) -> int | None:
        """A line of ``memory.stat``; that of a pack that was just written, for example."""
        for line in _text(self.directory / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return _number(value)
        return None


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """The groups whose limits hold for this process, its own first, then those above it.

    Those of version 1 come before those of version 2; none without control groups. ``root``: where
    ``proc`` and ``sys`` lie.
    """
    groups = []
    for version, own, top in _places(root):
        for directory in (own, *own.parents):
            group = MemoryGroup(directory, version)
            if directory == own or group.counts_below:
                groups.append(group)
            if directory == top:
                break
    return groups


def _places(root: Path) -> Iterator[tuple[Version, Path, Path]]:
    """Per version that is mounted: this process's group, and the mount that shows it."""
    paths = _own_paths(root)
    mounts: dict[Version, list[tuple[str, Path]]] = {V1: [], V2: []}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        shown, place = map(_unescape, fields.split()[3:5])
        kind, _, options = rest.split(" ", 2)  # the source between them may be empty
        directory = root / place.lstrip("/")
        if kind == "cgroup2":
            mounts[V2].append((shown, directory))
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts[V1].append((shown, directory))
    for version in (version for version in (V1, V2) if version in paths):
        path = paths[version]
        # A container may be shown its own group as the mount's top, under a path of the host's.
        inside = [mount for mount in mounts[version] if _is_within(path, mount[0])]
        for shown, top in inside[:1] or mounts[version][:1]:
            relative = os.path.relpath(path, shown) if inside else "."
            yield version, top / relative, top


def _own_paths(root: Path) -> dict[Version, str]:
    """The path of this process's group in each hierarchy that may count memory."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[V2] = path
        elif "memory" in controllers.split(","):
            paths[V1] = path
    return paths


def _is_within(path: str, directory: str) -> bool:
    return os.path.commonpath([path, directory]) == directory


def _unescape(text: str) -> str:
    r"""``/a\040b``, as the kernel writes a path with a blank, as ``/a b``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _number(text: str) -> int | None:
    """None for ``max``, for nothing, and for what is no number."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _text(path: Path) -> str:
    """What the file says; nothing if it is not there or may not be read."""
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""

"""Where a process's memory lies, so that what processes share is counted once."""

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Footprint:
    """PSS in bytes: a page that n processes map counts 1/n in each, so sums count it once."""

    own: int = 0
    """Anonymous memory: heap, stacks, tensors that are nobody else's."""
    shared: int = 0
    """Memory files: the arena, directory and session page."""
    pack: int = 0
    """Of the pack's files: the mapped trunk, whose pages are the page cache's."""
    files: int = 0
    """Of other files: programs and libraries."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))

    def __add__(self, other: Self) -> "Footprint":
        return Footprint(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def footprint(pid: int, pack: Path) -> Footprint:
    """Of process ``pid`` now, from its smaps; ``pack`` is where the pack's files are."""
    sums = {"own": 0, "shared": 0, "pack": 0, "files": 0}
    kind = "own"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            # A mapping's head: addresses, rights, offset, device, inode and perhaps a path.
            path = line.split(maxsplit=5)[5:]
            kind = _kind(path[0] if path else "", str(pack))
        elif name == "Pss:":
            sums[kind] += int(rest.split()[0]) << 10
    return Footprint(**sums)


def _kind(path: str, pack: str) -> str:
    if path.startswith("/memfd:"):
        return "shared"
    if path.startswith(pack):
        return "pack"
    return "files" if path.startswith("/") else "own"

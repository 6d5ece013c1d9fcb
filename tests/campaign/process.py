"""What the daemon's process holds, as /proc tells it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holdings:
    """Of one process at one moment."""

    num_files: int
    num_mappings: int
    num_threads: int
    anonymous_bytes: int
    """RSS without files and without shared memory: the heap."""
    shared_bytes: int
    """RSS of shared memory: arena, directories, session pages."""


def holdings(pid: int) -> Holdings:
    """Of a running process."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    maps = (proc / "maps").read_text().splitlines()
    return Holdings(
        num_files=len(list((proc / "fd").iterdir())),
        # The heap's own arenas come and go; what is shared is what a session maps.
        num_mappings=sum("memfd:" in line for line in maps),
        num_threads=int(status["Threads"]),
        anonymous_bytes=_kilobytes(status["RssAnon"]),
        shared_bytes=_kilobytes(status["RssShmem"]),
    )


def exists(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _kilobytes(field: str) -> int:
    return int(field.split()[0]) * 1024

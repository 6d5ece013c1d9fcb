"""How much memory there is for a process, and how much of it is free."""

from collections.abc import Iterator
from pathlib import Path

from expertd.pack.manifest import Manifest


def memory_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process could still take: MemAvailable, or its cgroup's rest if less."""
    available = _meminfo_bytes(proc, "MemAvailable")
    for group, limit in _limits(proc, cgroups):
        try:
            used = int((group / "memory.current").read_text()) - _droppable_bytes(group)
        except OSError:
            continue
        available = min(available, max(0, limit - used))
    return available


def memory_total(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that it could take at most, if nobody else took any: MemTotal, or a cgroup's limit."""
    limits = (limit for _, limit in _limits(proc, cgroups))
    return min([_meminfo_bytes(proc, "MemTotal"), *limits])


def default_ram_bytes(manifest: Manifest) -> int:
    """All experts of the pack, or half of the available memory if they do not fit in that."""
    return min(manifest.expert_bytes, max(memory_available() // 2, manifest.working_set_bytes))


def _meminfo_bytes(proc: Path, name: str) -> int:
    fields = dict(
        line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line
    )
    return int(fields[name].split()[0]) << 10


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[Path, int]]:
    """This process's cgroups that have one."""
    for group in _own_cgroups(proc, cgroups):
        try:
            limit = (group / "memory.max").read_text().strip()
        except OSError:
            continue
        if limit != "max":
            yield group, int(limit)


def _droppable_bytes(group: Path) -> int:
    """Page cache that is charged to the cgroup, such as a pack's that was just written."""
    for line in (group / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def _own_cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's cgroup (version 2) and those above it."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            group = cgroups / path.lstrip("/")
            return [group, *(parent for parent in group.parents if parent.is_relative_to(cgroups))]
    return []

"""How much memory a process may still take."""

from pathlib import Path


def memory_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process could still take: MemAvailable, or its cgroup's rest if less."""
    fields = dict(
        line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) << 10
    for group in _own_cgroups(proc, cgroups):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text()) - _droppable_bytes(group)
        except OSError:
            continue
        if limit != "max":
            available = min(available, max(0, int(limit) - used))
    return available


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

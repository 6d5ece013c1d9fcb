"""How much memory there is for a process, and how much of it is free."""

from pathlib import Path

from expertstore.errors import PreconditionError
from expertstore.pack.manifest import Manifest
from expertstore.shared.control_groups import memory_groups

_ROOT = Path("/")


def memory_available(root: Path = _ROOT) -> int:
    """Bytes that this process could still take: MemAvailable, or its groups' rest if less.

    ``root``: where ``proc`` and ``sys`` lie. Raises :class:`PreconditionError` if the host does
    not say how much it has.
    """
    rests = (
        group.limit_bytes - group.used_bytes
        for group in memory_groups(root)
        if group.limit_bytes is not None
    )
    return max(0, min([_meminfo_bytes(root, "MemAvailable"), *rests]))


def memory_total(root: Path = _ROOT) -> int:
    """Bytes that it could take at most, if nobody else took any: MemTotal, or a group's limit.

    As :func:`memory_available`.
    """
    limits = (group.limit_bytes for group in memory_groups(root))
    return min(
        [_meminfo_bytes(root, "MemTotal"), *(limit for limit in limits if limit is not None)]
    )


def default_ram_bytes(manifest: Manifest) -> int:
    """All experts and tables of the pack, or half of the available memory if that is less."""
    half = max(memory_available() // 2, manifest.working_set_bytes)
    # A row takes a little more in the arena than in its file.
    return min(manifest.expert_bytes + manifest.table_bytes * 9 // 8, half)


def _meminfo_bytes(root: Path, name: str) -> int:
    path = root / "proc/meminfo"
    try:
        lines = path.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields[name].split()[0]) << 10
    except (OSError, KeyError) as error:
        reason = getattr(error, "strerror", None) or f"it has no {name}"
        raise PreconditionError(
            f"{path} does not tell how much memory this host has ({reason}); mount /proc, and not "
            "with subset=pid (systemd: ProcSubset=all)."
        ) from error

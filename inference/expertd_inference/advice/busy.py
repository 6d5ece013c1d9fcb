"""Whether others used the host while it was measured, which makes every figure too low."""

import os
from dataclasses import dataclass
from pathlib import Path

OTHERS_SHARE = 0.1
"""Of all cores' time that others may take before figures are called too low."""
STEAL_SHARE = 0.03
"""The same of a hypervisor, which gives it to other machines."""


@dataclass(frozen=True)
class CpuTimes:
    """Of all cores together, in seconds since the host's start; ``own`` is this process's."""

    total: float
    busy: float
    steal: float
    own: float


def read_cpu_times(proc: Path = Path("/proc")) -> CpuTimes | None:
    """Now; None where the host does not say."""
    try:
        words = (proc / "stat").read_text().split()[1:9]
        user, nice, system, idle, iowait, irq, softirq, steal = (
            int(word) / os.sysconf("SC_CLK_TCK") for word in words
        )
    except (OSError, ValueError):
        return None
    own = os.times()
    return CpuTimes(
        user + nice + system + idle + iowait + irq + softirq + steal,
        user + nice + system + irq + softirq,
        steal,
        own.user + own.system + own.children_user + own.children_system,
    )


def busy_warning(before: CpuTimes | None, after: CpuTimes | None, load: float) -> str | None:
    """What to be told if others took much between the two; ``load`` is the load average before."""
    if before is None or after is None or after.total <= before.total:
        return None
    total = after.total - before.total
    others = max(0.0, after.busy - before.busy - (after.own - before.own)) / total
    steal = (after.steal - before.steal) / total
    if others <= OTHERS_SHARE and steal <= STEAL_SHARE:
        return None
    return (
        f"This host is busy: while it was measured, others used {others:.0%} of its cores' time, "
        f"and its hypervisor took {steal:.0%} (load average {load:.1f} before). All figures are "
        "too low; ask again when it is idle."
    )

"""What a GPU host is, for the head of its results; nothing that says whose it is."""

import subprocess
import sys

from bench.gpu_rig import Rig
from bench.gpu_rows import Rows
from bench.host import describe_host

_COMMANDS = (
    "nvidia-smi",
    "nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.max,"
    "clocks.max.sm --format=csv",
    "free -g",
    "df -h /dev/shm /tmp",
    "ulimit -l",
    "lscpu | head -25",
    "cat /sys/kernel/mm/transparent_hugepage/enabled",
    "cat /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "g++ --version | head -1",
)


def measure(rig: Rig, rows: Rows) -> None:
    """A row, and what the host's tools say in ``env.txt``."""
    rows.put("host", **{name.replace(" ", "_"): value for name, value in describe_host().items()})
    if rig.fake:
        rows.skipped("nvidia-smi")
    with (rows.path.parent / "env.txt").open("w") as file:
        commands = [*_COMMANDS, f"{sys.executable} -m pip list"]
        for command in _COMMANDS[2:] if rig.fake else commands:
            file.write(f"$ {command}\n{_output(command)}\n")
            file.flush()


def _output(command: str) -> str:
    try:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=15, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error}\n"
    return done.stdout + done.stderr

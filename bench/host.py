"""What a host is, for the head of its figures."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from expertstore.shared.host_memory import memory_total

_PACKAGES = ("torch", "triton", "transformers", "grpcio", "msgspec", "xxhash", "uvloop")
_QUERY = "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current"


def describe_host() -> dict[str, str]:
    """Names and values, nothing of which says whose host it is."""
    host = {
        "processor": _processor(),
        "logical CPUs": str(os.cpu_count()),
        "memory": f"{memory_total() / 2**30:.0f} GiB",
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            host[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            host[package] = "missing"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        host["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        host["CUDA of torch"] = str(torch.version.cuda)
        host["nvidia-smi"] = _nvidia_smi()
    return host


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "not there"
    return done.stdout.strip().replace("\n", "; ")

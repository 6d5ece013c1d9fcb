"""What a decoded token cannot take less than: the link's time, the memory's, or the launches'."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.gpu_copies import link_bytes_per_second, memory_bytes_per_second
from bench.gpu_rig import Rig
from expertd_inference.device.device import Device

_KERNELS = 1000


@dataclass(frozen=True)
class Bound:
    """``seconds`` at least, and ``by`` what: link, memory or launches."""

    seconds: float
    by: str


@dataclass(frozen=True)
class Launches:
    """How many kernels a token launches at least: one by one, and as part of CUDA graphs."""

    eager: int = 0
    recorded: int = 0


@dataclass(frozen=True)
class Rates:
    """What the host can do: bytes per second, and seconds per launch of a small kernel."""

    link: float
    memory: float
    eager_launch: float
    recorded_launch: float

    def bound(self, copied_bytes: float, read_bytes: float, launches: Launches) -> Bound:
        """The longest of the three; what is copied, read and launched may overlap."""
        seconds = {
            "link": copied_bytes / self.link,
            "memory": read_bytes / self.memory,
            "launches": launches.eager * self.eager_launch
            + launches.recorded * self.recorded_launch,
        }
        by = max(seconds, key=lambda name: seconds[name])
        return Bound(seconds[by], by)


def measure_rates(rig: Rig, device: Device) -> Rates:
    """Of the host's first GPU. The fake's launches cost nothing."""
    link, memory = link_bytes_per_second(rig, device), memory_bytes_per_second(rig, device)
    if rig.fake:
        return Rates(link, memory, 0.0, 0.0)
    x = torch.zeros(2048, dtype=torch.bfloat16, device=device.torch_device)
    return Rates(
        link, memory, host_seconds(lambda: x + x), graph_seconds(lambda: x + x, _KERNELS) / _KERNELS
    )


def host_seconds(action: Callable[[], object], times: int = _KERNELS) -> float:
    """What a call costs the host, which does not wait for the GPU meanwhile."""
    for _ in range(20):
        action()
    _wait()
    begin = time.perf_counter()
    for _ in range(times):
        action()
    seconds = time.perf_counter() - begin
    _wait()
    return seconds / times


def graph_seconds(action: Callable[[], object], times: int) -> float:
    """What a GPU takes for a CUDA graph of so many calls, which launch in turn."""
    return device_seconds(graph_of(action, times).replay)


def graph_of(action: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """A recording of so many calls."""
    action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            action()
    return graph


def device_seconds(action: Callable[[], object], rounds: int = 5) -> float:
    """What the work of a call takes on the GPU: the best of some rounds."""
    action()
    best = float("inf")
    for _ in range(rounds):
        if not torch.cuda.is_available():
            best = min(best, host_seconds(action, 1))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

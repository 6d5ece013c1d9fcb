"""What a decoded token cannot take less than: the link's time, the memory's, or the launches'."""

from dataclasses import dataclass

import torch

from bench.gpu_copies import link_bytes_per_second, memory_bytes_per_second
from bench.gpu_rig import Rig
from bench.gpu_timing import KERNELS, graph_seconds, host_seconds
from expertd_inference.device.device import Device


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
        link, memory, host_seconds(lambda: x + x), graph_seconds(lambda: x + x, KERNELS) / KERNELS
    )

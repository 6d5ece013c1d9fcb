"""What runs in a GPU bench, in turns with its limit: as CUDA graphs, timed on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.figures import timed


@dataclass(frozen=True)
class Run:
    """How to measure: on ``device``, which is the CPU only to see this program work."""

    device: str
    rounds: int
    calls: int
    """In one graph."""
    cache_bytes: int
    """Of different experts: many times what the GPU's own cache holds."""


class Copy:
    """The probe: a copy inside the device's memory, larger than any cache."""

    def __init__(self, run: Run) -> None:
        self._source = torch.zeros(run.cache_bytes // 4, dtype=torch.uint8, device=run.device)
        self._target = torch.zeros_like(self._source)
        self.num_bytes = 2 * self._source.nbytes

    def run(self) -> None:
        """Copies."""
        self._target.copy_(self._source)


def captured(run: Run, actions: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All ``actions`` as one CUDA graph; on the CPU, one after another."""
    if run.device == "cpu":
        return lambda: [action() for action in actions] and None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for action in actions:  # compiles, and allocates
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    return graph.replay


def turns(
    run: Run, ours: Callable[[], None], our_work: int, limit: Callable[[], None], limit_work: int
) -> list[tuple[float, float]]:
    """Giga-units of work a second, of ours and of the limit, in turns."""
    return [
        (our_work / seconds(run, ours) / 1e9, limit_work / seconds(run, limit) / 1e9)
        for _ in range(run.rounds)
    ]


def bounded(
    run: Run, ours: Callable[[], None], num_bytes: int, num_launches: int, copy: "Copy"
) -> tuple[list[tuple[float, float]], str]:
    """GB/s of ours and of the bound, in turns, and the bound: memory or launches.

    A call of few bytes cannot be faster than kernels that do nothing are launched.
    """
    one = torch.zeros(32, device=run.device)
    launches = captured(run, [lambda: one.add_(1)] * num_launches)
    memory_seconds = num_bytes * seconds(run, copy.run) / copy.num_bytes
    if seconds(run, launches) > memory_seconds:
        return turns(run, ours, num_bytes, launches, num_bytes), "launches"
    return turns(run, ours, num_bytes, copy.run, copy.num_bytes), "memory"


def seconds(run: Run, action: Callable[[], None]) -> float:
    """What a call takes on the device, once it is warm."""
    if run.device == "cpu":
        return timed(action)
    action()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 3e3

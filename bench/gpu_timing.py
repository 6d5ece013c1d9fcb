"""Seconds of calls: on the host, and of what they queue on a GPU."""

import time
from collections.abc import Callable

import torch

KERNELS = 1000
"""Calls of something short that are timed together."""


def host_seconds(action: Callable[[], object], times: int = KERNELS) -> float:
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

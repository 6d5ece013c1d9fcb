"""CUDA as torch offers it, for hosts without: streams that note what they wait for.

Tensors on such a device are torch's fake ones, which have a shape and no memory. Host memory is
registered, and copied from, by :class:`~expertd_testing.fake_cudart.FakeCudart`, on real memory.
"""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

NUM_DEVICES = 2


@dataclass(eq=False)
class Stream:
    """``waited`` for these streams and events."""

    device: torch.device
    waited: list[Any] = field(default_factory=list)
    cuda_stream: int = 0

    def wait_stream(self, stream: "Stream") -> None:
        self.waited.append(stream)

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        pass


class Event:
    """Always done."""

    def __init__(self, *, enable_timing: bool) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return True


class Graph:
    """A capture, as torch ends one: what an operation has made invalid is not cleaned up."""

    def __init__(self, cuda: "Cuda") -> None:
        self._cuda = cuda
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert not self._cuda.is_capturing
        self._pool = pool or object()
        self._cuda.is_capturing = self._cuda.generator_records = True
        self._cuda.pools.append(self._pool)

    def capture_end(self) -> None:
        self._cuda.is_capturing = False
        if self._cuda.is_invalid:
            self._cuda.is_invalid = False
            raise torch.AcceleratorError("CUDA error: a failed operation while capturing")
        self._cuda.end_allocate_to_pool(0, self._pool)
        self._cuda.generator_records = False
        warnings.warn("The CUDA Graph is empty. This usually means", stacklevel=2)


@dataclass
class Cuda:
    """What a test may change of it, and see."""

    capability: tuple[int, int] = (9, 0)
    current: dict[torch.device, Stream] = field(default_factory=dict)
    """Each device's compute stream."""
    num_emptied: int = 0
    is_capturing: bool = False
    is_invalid: bool = False
    """The capture, by an operation that it cannot have."""
    generator_records: bool = False
    pools: list[Any] = field(default_factory=list)
    """Those that the allocator serves from."""

    def end_allocate_to_pool(self, index: int, pool: Any) -> None:
        """Raises RuntimeError if it does not."""
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)


def pretend(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Until the test's end there are two devices."""
    cuda, empty = Cuda(), torch.empty
    for index in range(NUM_DEVICES):
        device = torch.device("cuda", index)
        cuda.current[device] = Stream(device)

    def set_device(device: Any) -> None:
        raise AssertionError("the process's current device is not ours to choose")

    def empty_cache() -> None:
        cuda.num_emptied += 1

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "get_device_name": lambda device: "Pretended",
        "get_device_capability": lambda device: cuda.capability,
        "mem_get_info": lambda device: (1 << 30, 2 << 30),
        "Stream": Stream,
        "Event": Event,
        "current_stream": cuda.current.__getitem__,
        "set_device": set_device,
        "empty_cache": empty_cache,
        "CUDAGraph": lambda: Graph(cuda),
        "graph_pool_handle": object,
        "synchronize": lambda device: None,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool, raising=False
    )
    monkeypatch.setattr(
        torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)
    )
    return cuda

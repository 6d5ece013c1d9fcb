"""How fast records come to the GPU, beside a plain copy from memory that torch has pinned.

From a real daemon's arena, which a worker maps read-only: registered, if the driver registers
such memory, or else staged, as the worker would do; and staged in any case. Beside it shared
memory that may be written to (what ``writable_uids`` gives), and the gather kernel, which reads
mapped memory without a copy engine.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.figures import Figure, compared
from bench.gpu_rig import Rig, seconds_of, writable_memory
from expertd_client import Session
from expertd_inference.device.device import CopyMode, Device, HostMemory

PART = "copies"
TOTAL_BYTES = 512 << 20
FAKE_BYTES = 1 << 20
ROUNDS = 5
GOAL = 0.95


def measure(rig: Rig, shape: str, session: Session) -> Iterator[Figure]:
    """Each way in turns with the plain copy, of records as large as the shape's."""
    rig.need(20)
    record_bytes = session.model.record_bytes
    total = FAKE_BYTES if rig.fake else TOTAL_BYTES
    count = max(1, min(total // record_bytes, session.arena_bytes // record_bytes))
    device = rig.open_device()
    staged = rig.open_device(staged=True)
    try:
        slots = device.allocate(count, record_bytes)
        plain = _plain(device, count, record_bytes, slots)
        arena = device.register(session.arena_address, session.arena_bytes)
        ways: list[tuple[str, Device, HostMemory, bool]] = [
            (f"the arena, read-only ({arena.mode.value})", device, arena, True),
            (
                "the arena by way of a pinned ring",
                staged,
                staged.register(session.arena_address, session.arena_bytes),
                False,
            ),
        ]
        anchor, address = writable_memory(count * record_bytes)
        writable = device.register(address, count * record_bytes)
        ways.append((f"writable shared memory ({writable.mode.value})", device, writable, True))
        for what, with_device, memory, is_dma in ways:
            copy = _records(with_device, memory, count, record_bytes, slots)
            yield _figure(
                f"{shape}: {what}",
                [(copy(), plain()) for _ in range(ROUNDS)],
                count * record_bytes,
                GOAL if is_dma and memory.mode is CopyMode.REGISTERED else None,
            )
        for what, memory in (("the arena", arena), ("writable memory", writable)):
            if not rig.fake and memory.device_address:
                gather = _gather(device, memory, count, record_bytes, slots)
                gather()
                turns = [(gather(), plain()) for _ in range(ROUNDS)]
                yield _figure(
                    f"{shape}: {what} by the gather kernel", turns, count * record_bytes, GOAL
                )
        for memory in (arena, writable):
            memory.close()
        del anchor
    finally:
        device.close()
        staged.close()


def link_bytes_per_second(rig: Rig, device: Device) -> float:
    """Of the plain copy, by itself."""
    num_bytes = FAKE_BYTES if rig.fake else 64 << 20
    slots = device.allocate(4, num_bytes)
    plain = _plain(device, 4, num_bytes, slots)
    plain()
    return 4 * num_bytes / min(plain() for _ in range(3))


def memory_bytes_per_second(rig: Rig, device: Device) -> float:
    """Read and written by a copy on the device."""
    if rig.fake:
        return 2e12
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(8):
            target.copy_(source)

    seconds_of(device, copy)
    return 16 * source.nbytes / min(seconds_of(device, copy) for _ in range(3))


def _figure(
    what: str, turns: list[tuple[float, float]], num_bytes: int, goal: float | None
) -> Figure:
    rates = [(num_bytes / ours / 1e9, num_bytes / limit / 1e9) for ours, limit in turns]
    return compared(PART, what, "GB/s", rates, at_least=goal)


def _plain(device: Device, count: int, size: int, slots: Tensor) -> Callable[[], float]:
    """Seconds that torch takes from memory that it has pinned."""
    on_gpu = device.torch_device.type == "cuda"
    # A few buffers: torch rounds each up to a power of two.
    source = torch.ones(min(count, 8), size, dtype=torch.uint8, pin_memory=on_gpu)
    memory = None if on_gpu else device.register(source.data_ptr(), source.nbytes)

    def run() -> Any:  # noqa: ANN401 - an event, or None
        event = None
        for number in range(count):
            place = number % len(source)
            if memory is None:
                slots[number].copy_(source[place], non_blocking=True)
            else:
                event = device.copy(memory, place * size, size, slots[number], _last(event))
        return event

    return lambda: seconds_of(device, run)


def _records(
    device: Device, memory: HostMemory, count: int, size: int, slots: Tensor
) -> Callable[[], float]:
    def run() -> Any:  # noqa: ANN401
        event = None
        for number in range(count):
            event = device.copy(memory, number * size, size, slots[number], _last(event))
        return event

    seconds_of(device, run)
    return lambda: seconds_of(device, run)


def _gather(
    device: Device, memory: HostMemory, count: int, size: int, slots: Tensor
) -> Callable[[], float]:
    from expertd_inference.kernels import triton_gather

    count = min(count, triton_gather.MAX_ROUTED)
    resolution = triton_gather.Resolution.empty(1, device.torch_device)
    resolution.source[:count] = torch.arange(count) * size
    resolution.target[:count] = torch.arange(count, dtype=torch.int32)

    def run() -> None:
        # As a step does it: a token's few experts at once. Here as many as the others copy.
        triton_gather.gather(
            resolution, slots, arena=memory.device_address, num_items=count, record_bytes=size
        )

    return lambda: seconds_of(device, run)


def _last(event: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return () if event is None else (event,)

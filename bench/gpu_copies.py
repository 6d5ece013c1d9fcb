"""How fast records come to the GPU, beside a plain copy from memory that torch has pinned.

From a real daemon's arena, which a worker maps read-only: registered, if the driver registers
such memory, or else staged, as the worker would do; and staged in any case. Beside it shared
memory that may be written to, and the gather kernel, which reads mapped memory without a copy
engine. Every way copies a number of records, shown in its row, in turns with a plain copy of as
many; a way whose records did not arrive is refused.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.figures import compared
from bench.gpu_figures import GpuFigure, of_gpu
from bench.gpu_rig import Rig, seconds_of, writable_memory
from expertd_client import Session
from expertd_inference.device.device import CopyMode, Device, HostMemory

PART = "copies"
TOTAL_BYTES = 512 << 20
FAKE_BYTES = 1 << 18
ROUNDS = 5
GOAL = 0.95


@dataclass(frozen=True)
class Turn:
    """``run`` copies the first ``num_records`` records, and returns the last one's event."""

    num_records: int
    run: Callable[[], Any]


def measure(rig: Rig, shape: str, session: Session) -> Iterator[GpuFigure]:
    """Each way in turns with the plain copy, of records as large as the shape's."""
    rig.need(20)
    size = session.model.record_bytes
    total = FAKE_BYTES if rig.fake else TOTAL_BYTES
    count = max(1, min(total // size, session.arena_bytes // size))
    device = rig.open_device()
    staged = rig.open_device(staged=True)
    try:
        slots = device.allocate(count, size)
        arena = device.register(session.arena_address, session.arena_bytes)
        ring = staged.register(session.arena_address, session.arena_bytes)
        anchor, address = writable_memory(count * size)
        writable = device.register(address, count * size)
        here = session.arena_address
        ways = [
            ("the arena", device, arena, here, records),
            ("the arena by a pinned ring", staged, ring, here, records),
            ("writable memory", device, writable, address, records),
            ("the arena by the gather kernel", device, arena, here, gathered),
            ("writable memory by the gather kernel", device, writable, address, gathered),
        ]
        for what, with_device, memory, source, way in ways:
            if way is gathered and not memory.device_address:
                continue
            turn = way(with_device, memory, count, size, slots)
            plain = plain_copy(device, turn.num_records, size, slots)
            check_arrival(with_device, turn, source, slots)
            num_bytes = turn.num_records * size
            yield of_gpu(
                compared(
                    PART,
                    f"{shape}: {what}, {turn.num_records} records",
                    "GB/s",
                    [
                        (
                            num_bytes / seconds_of(with_device, turn.run) / 1e9,
                            num_bytes / seconds_of(device, plain.run) / 1e9,
                        )
                        for _ in range(1 if rig.fake else ROUNDS)
                    ],
                    at_least=GOAL if memory.mode is CopyMode.REGISTERED else None,
                ),
                arena=memory.mode.value,
                bound="link",
            )
        for memory in (arena, ring, writable):
            memory.close()
        del anchor
    finally:
        device.close()
        staged.close()


def link_bytes_per_second(rig: Rig, device: Device) -> float:
    """Of the plain copy, by itself."""
    num_bytes = FAKE_BYTES if rig.fake else 64 << 20
    slots = device.allocate(4, num_bytes)
    plain = plain_copy(device, 4, num_bytes, slots).run
    seconds_of(device, plain)
    return 4 * num_bytes / min(seconds_of(device, plain) for _ in range(3))


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


def plain_copy(device: Device, count: int, size: int, slots: Tensor) -> Turn:
    """From memory that torch has pinned, by torch."""
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

    return Turn(count, run)


def records(device: Device, memory: HostMemory, count: int, size: int, slots: Tensor) -> Turn:
    """By the device's copies, one record after the other."""

    def run() -> Any:  # noqa: ANN401
        event = None
        for number in range(count):
            event = device.copy(memory, number * size, size, slots[number], _last(event))
        return event

    return Turn(count, run)


def gathered(device: Device, memory: HostMemory, count: int, size: int, slots: Tensor) -> Turn:
    """By the gather kernel, which takes so many records at once and no more."""
    from expertd_inference.kernels.gpu import triton_gather

    count = min(count, triton_gather.MAX_ROUTED)
    resolution = triton_gather.Resolution.empty(1, device.torch_device)
    resolution.source[:count] = torch.arange(count) * size
    resolution.target[:count] = torch.arange(count, dtype=torch.int32)

    def run() -> None:
        triton_gather.gather(
            resolution, slots, arena=memory.device_address, num_items=count, record_bytes=size
        )

    return Turn(count, run)


def check_arrival(device: Device, turn: Turn, source: int, slots: Tensor) -> None:
    """Runs it once; raises RuntimeError unless what it counts has come, and nothing else.

    ``source`` is the address of the first record.
    """
    slots.fill_(0xFF)
    seconds_of(device, turn.run)
    size, last = slots.shape[1], turn.num_records - 1
    (found,) = device.to_host(slots[last])
    expected = torch.frombuffer(
        bytearray(ctypes.string_at(source + last * size, size)), dtype=torch.uint8
    )
    if not torch.equal(found, expected):
        raise RuntimeError(f"record {last} of {turn.num_records} did not arrive")
    if not bool((slots[turn.num_records :] == 0xFF).all()):
        raise RuntimeError(f"more than {turn.num_records} records arrived")


def _last(event: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return () if event is None else (event,)

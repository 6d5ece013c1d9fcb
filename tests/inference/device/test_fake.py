"""The fake keeps the seam's promises in virtual time, and punishes whoever relies on more."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertd_inference.device.device import CopyMode, Device, HostMemory
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.reference import fill_slots
from expertd_inference.kernels.wave import CachedWave, ExpertsSpec, Routed, Wave
from expertd_testing.fake_device import (
    GARBAGE,
    FakeDevice,
    FakeSpeed,
    HazardError,
    SpanKind,
)
from expertstore.errors import DeviceLostError, DeviceMemoryError
from tests.inference.pack_source import PackSource

SLOT = 4096


class Host:
    """Host memory of a few records, the n-th full of n + 1."""

    def __init__(self, device: Device, num_records: int = 4) -> None:
        self.bytes = bytearray(b"".join(bytes([n + 1]) * SLOT for n in range(num_records)))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.memory: HostMemory = device.register(address, len(self.bytes))


def test_the_bytes_arrive_with_the_event_and_not_before() -> None:
    device = FakeDevice()
    host, slots = Host(device), device.allocate(2, SLOT)
    event = device.copy(host.memory, SLOT, SLOT, slots[0])
    assert not event.done
    assert (slots == GARBAGE).all()
    event.wait()
    assert event.done
    assert (slots[0] == 2).all()
    assert (slots[1] == GARBAGE).all()
    assert device.num_syncs == 1
    event.wait()
    assert device.num_syncs == 1, "it was done"


def test_the_source_is_read_when_the_copy_completes() -> None:
    device = FakeDevice()
    host, slots = Host(device), device.allocate(1, SLOT)
    event = device.copy(host.memory, 0, SLOT, slots[0])
    host.bytes[:SLOT] = b"\x55" * SLOT
    event.wait()
    assert (slots[0] == 0x55).all()


def test_copies_take_turns_on_the_link_and_complete_out_of_order() -> None:
    speed = FakeSpeed(delay_seconds=1e-4, num_engines=2)
    device = FakeDevice(speed=speed, seed=1)
    host, slots = Host(device), device.allocate(4, SLOT)
    events = [device.copy(host.memory, n * SLOT, SLOT, slots[n]) for n in range(4)]
    times = [event.time for event in events]
    assert times != sorted(times)
    events[times.index(min(times))].wait()
    assert sum(bool((slots[n] == n + 1).all()) for n in range(4)) == 1
    events[times.index(max(times))].wait()
    assert all((slots[n] == n + 1).all() for n in range(4))


def test_a_copy_waits_for_what_comes_before_it() -> None:
    device = FakeDevice()
    host, slots = Host(device), device.allocate(1, SLOT)
    first = device.copy(host.memory, 0, SLOT, slots[0])
    with pytest.raises(HazardError, match="two copies"):
        device.copy(host.memory, SLOT, SLOT, slots[0])
    second = device.copy(host.memory, SLOT, SLOT, slots[0], after=[first])
    assert second.time > first.time
    second.wait()
    assert (slots[0] == 2).all()


def test_host_memory_is_not_let_go_of_beneath_a_copy() -> None:
    device = FakeDevice()
    host, slots = Host(device), device.allocate(1, SLOT)
    event = device.copy(host.memory, 0, SLOT, slots[0])
    with pytest.raises(HazardError, match="let go"):
        host.memory.close()
    event.wait()
    host.memory.close()
    host.memory.close()
    with pytest.raises(HazardError, match="let go"):
        device.copy(host.memory, 0, SLOT, slots[0])


def test_staged_copies_cost_the_host_time() -> None:
    times = []
    for registers in (True, False):
        device = FakeDevice(registers=registers)
        host, slots = Host(device), device.allocate(1, SLOT)
        assert host.memory.mode is (CopyMode.REGISTERED if registers else CopyMode.STAGED)
        begin = device.clock()
        device.copy(host.memory, 0, SLOT, slots[0])
        times.append(device.clock() - begin)
    assert times[1] > times[0]


def test_more_than_there_is_free_is_refused() -> None:
    device = FakeDevice(memory_bytes=10 * SLOT)
    device.allocate(8, SLOT)
    assert device.free_bytes() == 2 * SLOT
    with pytest.raises(DeviceMemoryError, match=r"fake:0 has 8.*free.*--cache-bytes"):
        device.allocate(3, SLOT)


def test_a_lost_device_answers_nothing() -> None:
    device = FakeDevice()
    host, slots = Host(device), device.allocate(1, SLOT)
    event = device.copy(host.memory, 0, SLOT, slots[0])
    device.lose()
    calls: list[Callable[[], Any]] = [
        device.free_bytes,
        device.mark,
        device.clock,
        event.wait,
        lambda: event.done,
        lambda: device.to_host(slots),
        lambda: device.copy(host.memory, 0, SLOT, slots[0]),
    ]
    for call in calls:
        with pytest.raises(DeviceLostError, match="fake:0 does not answer"):
            call()
    host.memory.close()
    device.close()


class Layer:
    """One layer of a tiny pack, and the cache that its experts are copied to."""

    def __init__(self, device: FakeDevice, source: PackSource) -> None:
        self.device, self.source = device, source
        layer = source.manifest.layers[0]
        layout = source.manifest.layouts[layer.layout]
        self.record_bytes, self.num_experts = layout.record_bytes, layer.num_experts
        self.spec = ExpertsSpec(
            layout, source.manifest.gate_order, lambda x: x.chunk(2, dim=-1)[0].sigmoid()
        )
        self.memory = device.register(source.arena_address, source.arena_bytes)
        self.cache = device.allocate(3, self.record_bytes)
        generator = torch.Generator().manual_seed(0)
        self.routed = Routed(
            torch.randn(5, 128, generator=generator),
            torch.tensor([[0, 3], [3, 5], [5, 0], [0, self.num_experts], [3, 0]]),
            torch.rand(5, 2, generator=generator),
        )

    def copy(self, expert: int, slot: int, **options: Any) -> Any:
        offset = self.source._offsets[0, expert]
        return self.device.copy(self.memory, offset, self.record_bytes, self.cache[slot], **options)

    def compute(self, places: dict[int, int]) -> torch.Tensor:
        slot_of = torch.full((self.num_experts,), -1, dtype=torch.int32)
        for expert, slot in places.items():
            slot_of[expert] = slot
        slots = self.routed.empty_slots()
        self.device.fill_slots_cached(
            slots, self.routed, CachedWave(self.cache, slot_of, self.spec)
        )
        return slots

    def expected(self, experts: list[int]) -> torch.Tensor:
        slots = self.routed.empty_slots()
        records = [self.source._offsets[0, e] for e in experts]
        arena = ArenaTensors(self.source.arena_address, self.source.arena_bytes)
        fill_slots(slots, self.routed, Wave(experts, records, arena, self.spec))
        return slots


@pytest.fixture
def layer(packed: Any) -> Layer:
    # Kernels so slow that the host is far ahead of them.
    speed = FakeSpeed(memory_bytes_per_second=1e9)
    return Layer(FakeDevice(speed=speed), PackSource(packed("mixtral", "4bit")))


def test_kernels_compute_what_the_reference_does(layer: Layer) -> None:
    events = [layer.copy(expert, slot) for slot, expert in enumerate((5, 0, 3))]
    for event in events:
        layer.device.wait_for(event)
    assert torch.equal(layer.compute({5: 0, 3: 2}), layer.expected([3, 5]))
    assert torch.equal(layer.compute({5: 0, 0: 1, 3: 2}), layer.expected([0, 3, 5]))
    assert layer.device.num_syncs == 0


def test_kernels_do_not_wait_by_themselves(layer: Layer) -> None:
    layer.device.wait_for(layer.copy(0, 1))
    layer.copy(5, 0)
    assert layer.compute({5: 0, 0: 1}).isnan().any(), "the slot's bytes had not arrived"


def test_a_slot_is_not_overwritten_beneath_a_kernel(layer: Layer) -> None:
    layer.device.wait_for(layer.copy(0, 1))
    layer.compute({0: 1})
    with pytest.raises(HazardError, match="while a kernel reads"):
        layer.copy(5, 1)
    event = layer.copy(5, 1, after=[layer.device.mark()])
    kernel, copy = layer.device.log[-2:]
    assert (kernel.kind, copy.kind) == (SpanKind.COMPUTE, SpanKind.COPY)
    assert copy.begin >= kernel.end
    layer.device.wait_for(event)
    assert torch.equal(layer.compute({5: 1}), layer.expected([5]))


def test_copies_run_while_a_kernel_does(layer: Layer) -> None:
    layer.device.wait_for(layer.copy(0, 1))
    layer.compute({0: 1})
    layer.copy(5, 0)
    kernel, copy = layer.device.log[-2:]
    assert copy.begin < kernel.end

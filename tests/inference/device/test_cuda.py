"""The CUDA device itself; all but the refusals need one (``make gpu-test``)."""

import mmap
import os

import pytest
import torch
from torch import Tensor

from expertd_client.arena_mapping import address_of
from expertd_inference.device.cuda import CudaDevice
from expertd_inference.device.device import CopyMode
from expertstore.errors import DeviceError, DeviceMemoryError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
PAGE = 4096
SLOT_BYTES = 40 << 20


class Arena:
    """Shared memory as a worker maps it, and what is in it."""

    def __init__(self, num_bytes: int, *, writable: bool) -> None:
        descriptor = os.memfd_create("arena")
        os.ftruncate(descriptor, num_bytes)
        ours = mmap.mmap(descriptor, num_bytes)
        self.content = torch.frombuffer(ours, dtype=torch.uint8)
        self.content.random_(0, 256, generator=torch.Generator().manual_seed(1))
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self.mapping = mmap.mmap(descriptor, num_bytes, access=access)
        os.close(descriptor)
        self.address, self.num_bytes = address_of(self.mapping), num_bytes

    def bytes_at(self, offset: int, num_bytes: int) -> Tensor:
        return self.content[offset : offset + num_bytes]


def test_a_device_that_is_not_there_is_refused_in_a_sentence() -> None:
    with pytest.raises(DeviceError, match="no device"):
        CudaDevice("gpu")
    absent = "cuda:77" if torch.cuda.is_available() else "cuda:0"
    with pytest.raises(DeviceError, match=absent):
        CudaDevice(absent)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("writable", [True, False], ids=["writable", "read-only"])
@pytest.mark.parametrize("staged", [False, True], ids=["registered", "staged"])
def test_records_arrive(writable: bool, staged: bool) -> None:
    said: list[str] = []
    device = CudaDevice(say=said.append, staged=staged)
    arena = Arena(3 * SLOT_BYTES, writable=writable)
    cache = device.allocate(4, SLOT_BYTES)
    memory = device.register(arena.address, arena.num_bytes)
    if writable and not staged:
        assert memory.mode is CopyMode.REGISTERED
        assert memory.device_address
    assert len(said) == (memory.mode is CopyMode.STAGED and not staged)
    events = [
        device.copy(memory, slot * PAGE, SLOT_BYTES - slot * 8, cache[slot]) for slot in range(4)
    ]
    for slot, event in enumerate(events):
        device.wait_for(event)
        (found,) = device.to_host(cache[slot, : SLOT_BYTES - slot * 8])
        assert torch.equal(found, arena.bytes_at(slot * PAGE, SLOT_BYTES - slot * 8))
        assert event.done
    device.close()
    # Nothing is left that a next kernel would be blamed for.
    assert torch.ones(1, device=device.torch_device).item() == 1
    again = CudaDevice(say=said.append, staged=staged)
    assert again.register(arena.address, arena.num_bytes).mode is memory.mode
    again.close()


@pytest.mark.gpu
@needs_gpu
def test_what_lies_past_the_registered_memory_has_been_read_on_return() -> None:
    """As a worker's own copies of records that the arena has no slot for, behind the arena."""
    device = CudaDevice(say=lambda _: None)
    arena = Arena(2 * SLOT_BYTES, writable=True)
    cache = device.allocate(1, SLOT_BYTES)
    memory = device.register(arena.address, SLOT_BYTES)
    expected = arena.bytes_at(SLOT_BYTES, SLOT_BYTES).clone()
    arrived = device.copy(memory, SLOT_BYTES, SLOT_BYTES, cache[0])
    arena.bytes_at(SLOT_BYTES, SLOT_BYTES).zero_()
    device.wait_for(arrived)
    (found,) = device.to_host(cache[0])
    assert torch.equal(found, expected)
    device.close()


@pytest.mark.gpu
@needs_gpu
def test_a_copy_waits_for_the_slot_s_last_reader() -> None:
    device = CudaDevice(say=lambda _: None)
    arena = Arena(SLOT_BYTES, writable=True)
    cache = device.allocate(1, SLOT_BYTES)
    cache.zero_()
    memory = device.register(arena.address, arena.num_bytes)
    total = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
    for _ in range(50):  # long enough to be overtaken
        total += cache.view(torch.int64).sum()
    arrived = device.copy(memory, 0, SLOT_BYTES, cache[0], after=[device.mark()])
    assert total.item() == 0
    arrived.wait()
    (found,) = device.to_host(cache[0])
    assert torch.equal(found, arena.content)
    device.close()


@pytest.mark.gpu
@needs_gpu
def test_what_goes_to_the_host_and_back_is_what_it_was() -> None:
    device = CudaDevice(say=lambda _: None)
    first = torch.arange(7, dtype=torch.int64)
    second = torch.rand(3, 5)
    there = device.to_device(first), device.to_device(second)
    first.zero_()
    syncs = device.num_syncs
    back = device.to_host(*there)
    assert device.num_syncs == syncs + 1
    assert torch.equal(back[0], torch.arange(7))
    assert torch.equal(back[1], second)
    # A clone: the next reading does not change it.
    device.to_host(torch.ones(9, dtype=torch.int64, device=device.torch_device))
    assert torch.equal(back[0], torch.arange(7))
    device.close()


@pytest.mark.gpu
@needs_gpu
def test_more_than_there_is_is_refused() -> None:
    device = CudaDevice(say=lambda _: None)
    with pytest.raises(DeviceMemoryError, match="cache-bytes"):
        device.allocate(device.free_bytes() // PAGE + (1 << 20), PAGE)
    device.close()

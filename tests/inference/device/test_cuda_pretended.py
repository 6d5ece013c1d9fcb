"""What of the CUDA device shows without one: on pretended devices, over a fake runtime."""

import ctypes
import mmap
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

from expertd_client.arena_mapping import address_of
from expertd_inference.device.cuda import CudaDevice
from expertd_inference.device.cuda_errors import explain
from expertd_inference.device.cudart import Cudart
from expertd_inference.device.device import CopyMode
from expertd_inference.device.recorder import CudaRecorder
from expertd_inference.device.registration import MIN_RANGE_BYTES, Registrations, on_device
from expertd_testing.fake_cudart import FakeCudart
from expertstore.errors import DeviceError, DeviceLostError, DeviceMemoryError
from tests.inference.device.pretended_cuda import Cuda, pretend

PAGE = mmap.PAGESIZE
SLOT_BYTES = 4 * PAGE
Make = Callable[..., CudaDevice]


class Arena:
    """Shared memory of random bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.mapping = mmap.mmap(-1, num_bytes)
        self.address, self.num_bytes = address_of(self.mapping), num_bytes

    def fill(self, offset: int, content: bytes) -> None:
        self.mapping[offset : offset + len(content)] = content


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return pretend(monkeypatch)


def device_on(runtime: FakeCudart, name: str = "cuda:0") -> CudaDevice:
    return CudaDevice(name, say=[].append, registered=Registrations(runtime))


def test_a_copy_into_fresh_slots_comes_after_what_their_memory_was_for(cuda: Cuda) -> None:
    device = device_on(FakeCudart())
    with FakeTensorMode():
        slots = device.allocate(4, SLOT_BYTES)
    assert slots.shape == (4, SLOT_BYTES)
    assert device.copy_stream.waited == [cuda.current[device.torch_device]]


def test_what_is_not_registered_of_a_record_is_staged(cuda: Cuda) -> None:
    runtime = FakeCudart(max_bytes=MIN_RANGE_BYTES)
    said: list[str] = []
    device = CudaDevice(say=said.append, registered=Registrations(runtime))
    arena = Arena(MIN_RANGE_BYTES + SLOT_BYTES)
    memory = device.register(arena.address, arena.num_bytes)
    assert memory.mode is CopyMode.PARTIAL
    assert memory.device_address == 0
    device.register(arena.address, arena.num_bytes).close()
    assert said == [
        "the GPU's driver registers 256.0 MiB of the 256.0 MiB of shared memory (out of memory "
        "(2)): copies of the rest go through a pinned buffer, slower and at the cost of CPU time."
    ]
    content = bytes(n % 251 for n in range(SLOT_BYTES))
    slot = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    for offset in (0, MIN_RANGE_BYTES - PAGE, MIN_RANGE_BYTES):
        arena.fill(offset, content)
        slot.zero_()
        device.copy(memory, offset, SLOT_BYTES, slot)
        # What is copied directly is read when the stream gets to it, the rest before that.
        ctypes.memset(arena.address + MIN_RANGE_BYTES, 0, SLOT_BYTES)
        runtime.run()
        assert bytes(slot.tolist()) == content, offset
    device.close()
    assert not runtime.registered


def test_two_devices_share_a_registration(cuda: Cuda) -> None:
    runtime, arena = FakeCudart(num_devices=2), Arena(PAGE)
    shared = Registrations(runtime)
    devices = [CudaDevice(f"cuda:{n}", registered=shared) for n in range(2)]
    memories = [device.register(arena.address, arena.num_bytes) for device in devices]
    assert [memory.mode for memory in memories] == [CopyMode.REGISTERED] * 2
    assert all(memory.device_address for memory in memories)
    devices[0].close()
    memories[0].close()
    assert runtime.registered
    devices[1].close()
    assert not runtime.registered


def test_registering_for_one_device_does_not_begin_to_use_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Setting the thread's own again, plainly, would take memory of it."""
    calls: list[tuple[str, int]] = []
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, lambda index, name=name: calls.append((name, index)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    runtime = Cudart.__new__(Cudart)  # without a library
    with on_device(runtime, 1):
        pass
    assert calls == [("_exchange_device", 1), ("_maybe_exchange_device", 0)]


def test_nothing_is_kept_of_an_arena_that_was_left(cuda: Cuda) -> None:
    device, arena = device_on(FakeCudart()), Arena(PAGE)
    for _ in range(3):
        memory = device.register(arena.address, arena.num_bytes)
        memory.close()
        memory.close()
    assert repr(device) == "<CudaDevice cuda:0 []>"


def test_at_its_end_the_driver_has_the_memory_back(cuda: Cuda) -> None:
    device = device_on(FakeCudart())
    device.close()
    assert cuda.num_emptied == 1


def test_a_capture_that_failed_leaves_nothing_recording(cuda: Cuda) -> None:
    """Neither torch's random numbers nor its allocator, which other models use as well."""
    recorder = CudaRecorder(torch.device("cuda", 0))

    def fails() -> None:
        with recorder.session():
            recorder.begin()
            cuda.is_invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        fails()
    assert not cuda.is_capturing
    assert not cuda.generator_records
    assert not cuda.pools


@pytest.mark.parametrize(("capability", "is_old"), [((7, 5), True), ((8, 0), False)])
def test_a_device_that_is_too_old_is_refused_in_a_sentence(
    capability: tuple[int, int], is_old: bool, cuda: Cuda
) -> None:
    cuda.capability = capability
    if not is_old:
        device_on(FakeCudart())
        return
    with pytest.raises(DeviceError, match=r"Pretended.*capability 7\.5.*need 8\.0.*--device"):
        device_on(FakeCudart())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access"), DeviceLostError),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLostError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), DeviceLostError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), DeviceMemoryError),
        (torch.AcceleratorError("CUDA error: out of memory"), DeviceMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), DeviceMemoryError),
        # A mistake in the call, on a device that is well.
        (RuntimeError("Expected all tensors to be on the same device, cuda:0 and cpu!"), None),
        (RuntimeError("expected scalar type Half but found BFloat16 on cuda:0"), None),
        (ValueError("CUDA error"), None),
        (torch.AcceleratorError("CUDA error: not permitted when stream is capturing"), None),
    ],
)
def test_which_errors_mean_a_lost_device(error: Exception, kind: type[Exception] | None) -> None:
    found = explain(error, "cuda:0", lambda: "nothing")
    assert (None if found is None else type(found)) is kind
    if found is not None:
        assert "cuda:0" in str(found)

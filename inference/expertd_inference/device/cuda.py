"""A CUDA device: its copy stream, its events, and the arena registered with its driver."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor

from expertd_inference.device.attention import without_cudnn_attention
from expertd_inference.device.cuda_errors import explain
from expertd_inference.device.cuda_memory import CudaMemory
from expertd_inference.device.device import Event, HostMemory
from expertd_inference.device.recorder import CudaRecorder
from expertd_inference.device.registration import (
    RefusedError,
    Registrations,
    check,
    explain_refusal,
    registrations,
)
from expertd_inference.device.staging import BUFFER_BYTES, NUM_BUFFERS, StagingRing
from expertd_inference.kernels.gpu.choice import gpu_kernels
from expertd_inference.kernels.wave import CachedWave, Routed
from expertstore.errors import DeviceError, DeviceMemoryError, ExpertdError
from expertstore.sizes import format_bytes

_ALIGNMENT = 64
_MIN_CAPABILITY = (8, 0)
"""What Triton compiles for, and has bfloat16."""


class CudaEvent:
    """A moment on one of the device's streams."""

    def __init__(self, device: "CudaDevice", stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)
        self._device = device

    @property
    def done(self) -> bool:
        """Whether it has come to pass."""
        with self._device.translating():
            return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Has the host wait."""
        if not self.done:
            self._device.num_syncs += 1
            with self._device.translating():
                self.event.synchronize()

    def seconds_since(self, earlier: "CudaEvent") -> float:
        """From ``earlier`` to this one on the device."""
        with self._device.translating():
            return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaDevice:
    """:class:`~expertd_inference.device.device.Device` for ``cuda:N``.

    ``say`` is told once, in one sentence, if memory cannot be registered. ``staged``: do not even
    try. The process's current device stays what it is. Raises DeviceError if there is no such
    device, or if it is too old for the kernels.
    """

    def __init__(
        self,
        name: str = "cuda:0",
        *,
        say: Callable[[str], None] | None = None,
        staged: bool = False,
        registered: Registrations | None = None,
    ) -> None:
        """``registered`` is what the process has registered, by default by the CUDA runtime."""
        self.torch_device = _device(name)
        self.name = str(self.torch_device)
        self.num_syncs = 0
        self._index = self.torch_device.index
        with self.translating():
            self.hardware = torch.cuda.get_device_name(self.torch_device)
            _check_capability(self)
        self._registrations = registered or registrations()
        self._say = say or _say_on_stderr
        self._said: set[str] = set()
        self._staged = staged
        with self.translating():
            self.copy_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._ring: StagingRing | None = None
        self._ring_memory: Tensor | None = None
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._memories: set[CudaMemory] = set()

    def __repr__(self) -> str:
        return f"<CudaDevice {self.name} {[*self._memories]}>"

    @property
    def compute_stream(self) -> torch.cuda.Stream:
        """Where the model's work goes: whichever stream is current."""
        return torch.cuda.current_stream(self.torch_device)

    def free_bytes(self) -> int:
        """What the driver has left, and what torch keeps for later."""
        with self.translating():
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            reserved = torch.cuda.memory_reserved(self.torch_device)
            return int(free) + reserved - torch.cuda.memory_allocated(self.torch_device)

    def allocate(self, num_slots: int, slot_bytes: int) -> Tensor:
        """Slots of undefined content."""
        try:
            slots = torch.empty(
                (num_slots, slot_bytes), dtype=torch.uint8, device=self.torch_device
            )
            # What the compute stream still does to this memory, which may have been another
            # tensor's, comes before the first copy.
            self.copy_stream.wait_stream(self.compute_stream)
            return slots
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.name} has {format_bytes(self.free_bytes())} free, and a cache of "
                f"{format_bytes(num_slots * slot_bytes)} was asked for; give a smaller "
                "--cache-bytes, or end what else uses the GPU."
            ) from error
        except Exception as error:
            raise self._translated(error) from error

    def register(self, address: int, num_bytes: int) -> CudaMemory:
        """Registered if the driver allows it."""
        memory = self._register(address, num_bytes)
        if memory.reason and memory.reason not in self._said:
            self._said.add(memory.reason)
            self._say(explain_refusal(memory.reason, num_bytes, memory.registered_bytes))
        self._memories.add(memory)
        return memory

    def copy(
        self,
        memory: HostMemory,
        offset: int,
        num_bytes: int,
        slot: Tensor,
        after: Sequence[Event] = (),
    ) -> CudaEvent:
        """On the copy stream; returns once it is queued, or for staged memory once it is read."""
        assert isinstance(memory, CudaMemory)
        with self.translating():
            for event in after:
                assert isinstance(event, CudaEvent)
                self.copy_stream.wait_event(event.event)
            target = slot.data_ptr() - offset
            for start, size, is_registered in memory.pieces(offset, num_bytes):
                send = self._send if is_registered else self._staging().copy
                send(target + start, memory.address + start, size)
            return CudaEvent(self, self.copy_stream)

    def mark(self) -> CudaEvent:
        """The end of the current stream."""
        with self.translating():
            return CudaEvent(self, self.compute_stream)

    def wait_for(self, event: Event) -> None:
        """The current stream waits."""
        assert isinstance(event, CudaEvent)
        with self.translating():
            self.compute_stream.wait_event(event.event)

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """By way of one pinned buffer; one wait for all of them."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        with self.translating():
            if end > self._pinned.nbytes:
                self._pinned = torch.empty(max(4096, end), dtype=torch.uint8, pin_memory=True)
            views = []
            for start, tensor in zip(starts, tensors, strict=True):
                view = self._pinned[start : start + tensor.nbytes].view(tensor.dtype)
                views.append(view.view(tensor.shape))
                views[-1].copy_(tensor, non_blocking=True)
            self.num_syncs += 1
            self.compute_stream.synchronize()
            return tuple(view.clone() for view in views)

    def to_device(self, tensor: Tensor) -> Tensor:
        """By way of pinned memory, which torch keeps until the copy is done."""
        with self.translating():
            return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def fill_slots_cached(self, slots: Tensor, routed: Routed, wave: CachedWave, /) -> None:
        """By the kernels of :mod:`~expertd_inference.kernels.gpu.choice`."""
        with self.translating():
            gpu_kernels().fill_slots_cached(slots, routed, wave)

    def recorder(self) -> CudaRecorder:
        """By CUDA graphs."""
        return CudaRecorder(self.torch_device)

    def in_step(self) -> AbstractContextManager[None]:
        """Keeps attention away from cuDNN."""
        return without_cudnn_attention()

    def clock(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def explain(self, error: BaseException) -> ExpertdError | None:
        """Out of memory, and everything that CUDA calls an error."""
        return explain(error, self.name, self._free)

    def close(self) -> None:
        """Waits for the copies, unregisters what still is, and gives the driver its memory."""
        # A lost device copies nothing any more, and has nothing to let go of.
        with suppress(RuntimeError):
            self.copy_stream.synchronize()
        for memory in [*self._memories]:
            memory.close()
        if self._ring is not None:
            self._ring.close()
        self._ring = self._ring_memory = None
        self._pinned = self._pinned.new_empty(0)
        with suppress(RuntimeError):
            # What torch keeps of it for later, other processes could not have.
            torch.cuda.empty_cache()

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Errors of torch's about this device become ours."""
        try:
            yield
        except ExpertdError:
            raise
        except Exception as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        return self.explain(error) or error

    def _register(self, address: int, num_bytes: int) -> CudaMemory:
        if self._staged:
            return CudaMemory(address, num_bytes, None, let_go=self._memories.discard)
        try:
            registration = self._registrations.take(self._index, address, num_bytes)
        except RefusedError as refused:
            reason = str(refused)
            return CudaMemory(
                address, num_bytes, None, reason=reason, let_go=self._memories.discard
            )

        def let_go(memory: CudaMemory) -> None:
            self._memories.discard(memory)
            self._registrations.give_back(registration)

        return CudaMemory(
            address,
            num_bytes,
            registration,
            device_address=registration.device_address(self._index),
            reason=registration.reason,
            let_go=let_go,
        )

    def _send(self, target: int, source: int, num_bytes: int) -> None:
        runtime = self._registrations.runtime
        code = runtime.copy_to_device(target, source, num_bytes, self.copy_stream.cuda_stream)
        if code:
            runtime.last_error()
            check(runtime, code, "copying an expert", lost=True)

    def _staging(self) -> StagingRing:
        if self._ring is None:
            self._ring_memory = torch.empty(
                (NUM_BUFFERS, BUFFER_BYTES), dtype=torch.uint8, pin_memory=True
            )
            self._ring = StagingRing(
                [buffer.data_ptr() for buffer in self._ring_memory],
                BUFFER_BYTES,
                self._send,
                lambda: CudaEvent(self, self.copy_stream),
            )
        return self._ring

    def _free(self) -> str:
        try:
            return format_bytes(torch.cuda.mem_get_info(self.torch_device)[0])
        except RuntimeError:
            return "nothing"


def _device(name: str) -> torch.device:
    """``cuda`` or ``cuda:N``, checked."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{name} is no device; give cuda or cuda:N.") from error
    if device.type != "cuda" or not torch.cuda.is_available():
        raise DeviceError(
            f"There is no CUDA device for {name} here; leave out --device to compute on the CPU, "
            "or install a torch built for CUDA and the driver."
        )
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"There is no {name}; this host has {torch.cuda.device_count()} CUDA devices."
        )
    return torch.device("cuda", index)


def _check_capability(device: CudaDevice) -> None:
    major, minor = torch.cuda.get_device_capability(device.torch_device)
    if (major, minor) < _MIN_CAPABILITY:
        raise DeviceError(
            f"{device.name} ({device.hardware}) has compute capability {major}.{minor}, and the "
            "kernels need 8.0 or later; leave out --device to compute on the CPU."
        )


def _say_on_stderr(message: str) -> None:
    sys.stderr.write(f"expert-run: {message}\n")
    sys.stderr.flush()

"""A device that a machine without a GPU can have: the seam's promises, and no more than them.

What it computes is real, by the reference over its own memory; only time is not. A copy takes
what latency and bandwidth say, on several engines and with random delays by ``seed``, so copies
complete out of order. Until one has completed in virtual time, the slot holds NaNs; the source
is read at completion, not before. What CUDA leaves undefined is an error here, a
:class:`HazardError`: overwriting a slot that a kernel may still read, copying into a slot that
another copy is still writing, letting go of host memory in the midst of a copy.
"""

import ctypes
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from expertd_inference.device.attention import without_cudnn_attention
from expertd_inference.device.device import CopyMode, Event, HostMemory
from expertd_inference.device.group import DEVICE_KINDS
from expertd_inference.device.registration import explain_refusal
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.reference import fill_slots
from expertd_inference.kernels.wave import CachedWave, Routed, Wave
from expertd_testing.fake_recorder import FakeRecorder
from expertstore.errors import DeviceLostError, DeviceMemoryError, ExpertdError
from expertstore.sizes import format_bytes

GARBAGE = 0xFF
"""What a slot's bytes are before its copy has arrived: NaN as bf16, fp16 and fp32."""


class HazardError(AssertionError):
    """The caller relied on an order that nothing establishes."""


@dataclass(frozen=True)
class FakeSpeed:
    """How long what takes, in virtual seconds; by default a server GPU on PCIe 5."""

    link_bytes_per_second: float = 50e9
    staged_bytes_per_second: float = 12e9
    copy_seconds: float = 8e-6
    """A copy's latency."""
    delay_seconds: float = 0.0
    """A random delay of each copy, up to so much."""
    num_engines: int = 1
    """So many copies run at once, each at the link's speed."""
    memory_bytes_per_second: float = 2e12
    """At which kernels read records."""
    call_seconds: float = 4e-6
    """What any call costs the host."""
    compile_seconds: float = 0.0
    """What the first call of our kernels costs the host."""
    trunk_seconds: float = 30e-6
    """What the compute stream does between two readings of a routing, besides our kernels."""


class SpanKind(Enum):
    """What a line of the fake's log is about."""

    COPY = auto()
    COMPUTE = auto()
    SYNC = auto()


class Span(NamedTuple):
    """Something that took virtual time."""

    kind: SpanKind
    begin: float
    end: float
    slots: tuple[int, ...]
    """The slots' addresses: written by a copy, read by a kernel."""


class FakeEvent:
    """A moment of a :class:`FakeDevice`."""

    def __init__(self, device: "FakeDevice", time: float) -> None:
        self.time = time
        self._device = device

    def __repr__(self) -> str:
        return f"<FakeEvent {self.time * 1e6:.1f} us>"

    @property
    def done(self) -> bool:
        """Whether the host's time has reached it. Asking takes time, as it does for real."""
        self._device.call()
        return self.time <= self._device.host_time

    def wait(self) -> None:
        """Moves the host's time there."""
        self._device.call()
        if self.time > self._device.host_time:
            self._device.sync(self.time)

    def seconds_since(self, earlier: "FakeEvent") -> float:
        """Raises HazardError unless both are done."""
        if max(self.time, earlier.time) > self._device.host_time:
            raise HazardError("an event's time was asked for before it had come to pass")
        return self.time - earlier.time


class FakeMemory:
    """A registered range, of which nobody may let go while a copy reads it."""

    def __init__(
        self, device: "FakeDevice", address: int, num_bytes: int, registered_bytes: int
    ) -> None:
        self.address, self.num_bytes = address, num_bytes
        self.registered_bytes = registered_bytes
        partly = CopyMode.PARTIAL if registered_bytes else CopyMode.STAGED
        self.mode = CopyMode.REGISTERED if registered_bytes == num_bytes else partly
        self.closed = False
        self._device = device

    @property
    def device_address(self) -> int:
        """Its own address, if all of it is registered."""
        return self.address if self.mode is CopyMode.REGISTERED else 0

    def close(self) -> None:
        """Raises HazardError if a copy from it is under way."""
        with self._device.lock:
            if not self.closed and not self._device.lost:
                self._device.check_idle(self)
            self.closed = True


@dataclass(eq=False)
class _Copy:
    arrival: float
    slot: int  # its address
    source: int
    num_bytes: int
    memory: FakeMemory
    arrived: int | None = None
    """A hash of the bytes, once a kernel that is ahead of the host has had them delivered."""

    def read(self) -> int:
        return hash(ctypes.string_at(self.source, self.num_bytes))


class FakeDevice:
    """A device of ``memory_bytes``, which registers up to ``max_registered_bytes`` of a range.

    ``say`` is told if that is not all of it. :meth:`lose` ends it.
    """

    def __init__(
        self,
        name: str = "fake:0",
        *,
        memory_bytes: int = 64 << 20,
        speed: FakeSpeed | None = None,
        seed: int = 0,
        registers: bool = True,
        max_registered_bytes: int = 1 << 60,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Without ``registers`` it refuses to register anything."""
        self.name = name
        self.hardware = "fake"
        self.torch_device = torch.device("cpu")
        self.num_syncs = 0
        self.host_time = 0.0
        self.lost = False
        self.log: list[Span] = []
        self.lock = threading.RLock()
        self.memory: list[FakeMemory] = []
        """All that was ever registered."""
        self.check_sources = True
        """Off where a test overwrites what a copy reads, as a daemon does that cuts off."""
        self._speed = speed or FakeSpeed()
        self._random = random.Random(seed)
        self._max_registered_bytes = max_registered_bytes if registers else 0
        self._say = say or (lambda _: None)
        self._has_said = False
        self._memory_bytes = memory_bytes
        self._allocated: list[Tensor] = []
        self._compute_time = 0.0
        self._engines = [0.0] * self._speed.num_engines
        self._copies: list[_Copy] = []
        self._read_until: dict[int, float] = {}
        self._compiled = False

    def __repr__(self) -> str:
        return f"<FakeDevice {self.name} {len(self._copies)} copies under way>"

    # The seam

    def free_bytes(self) -> int:
        """What is left of ``memory_bytes``."""
        self.call()
        return self._memory_bytes - sum(tensor.nbytes for tensor in self._allocated)

    def allocate(self, num_slots: int, slot_bytes: int) -> Tensor:
        """Slots of garbage."""
        if num_slots * slot_bytes > (free := self.free_bytes()):
            raise DeviceMemoryError(
                f"{self.name} has {format_bytes(free)} free, and a cache of "
                f"{format_bytes(num_slots * slot_bytes)} was asked for; give a smaller "
                "--cache-bytes."
            )
        tensor = torch.full((num_slots, slot_bytes), GARBAGE, dtype=torch.uint8)
        self._allocated.append(tensor)
        return tensor

    def register(self, address: int, num_bytes: int) -> FakeMemory:
        """Registered, or staged if this device refuses, or the one and the other."""
        self.call()
        registered = min(num_bytes, self._max_registered_bytes)
        memory = FakeMemory(self, address, num_bytes, registered)
        if registered < num_bytes and not self._has_said:
            self._has_said = True
            self._say(explain_refusal("out of memory (2)", num_bytes, registered))
        self.memory.append(memory)
        return memory

    def copy(
        self,
        memory: HostMemory,
        offset: int,
        num_bytes: int,
        slot: Tensor,
        after: Sequence[Event] = (),
    ) -> FakeEvent:
        """Spoils the slot now; the record arrives when the event comes to pass."""
        assert isinstance(memory, FakeMemory)
        self.call()
        with self.lock:
            address, speed = slot.data_ptr(), self._speed
            if memory.closed:
                raise HazardError("a copy from memory that was let go of")
            if offset < 0 or offset < memory.num_bytes < offset + num_bytes:
                raise HazardError("a copy across the end of its source")
            if num_bytes > slot.nbytes:
                raise HazardError("a copy past the end of its slot")
            # What lies past its end is this process's own memory, and not registered.
            staged_bytes = min(num_bytes, max(0, offset + num_bytes - memory.registered_bytes))
            self.host_time += staged_bytes / speed.staged_bytes_per_second
            engine = self._engines.index(min(self._engines))
            begin = max(self.host_time, self._engines[engine], *map(_time, after), 0.0)
            if begin < self._read_until.get(address, 0.0):
                raise HazardError(f"{slot.storage_offset()}: overwritten while a kernel reads it")
            if any(copy.slot == address and copy.arrival > begin for copy in self._copies):
                raise HazardError(f"{slot.storage_offset()}: two copies write it at once")
            duration = num_bytes / speed.link_bytes_per_second
            self._engines[engine] = begin + duration
            delay = self._random.uniform(0, speed.delay_seconds)
            arrival = begin + duration + speed.copy_seconds + delay
            slot.fill_(GARBAGE)
            self._copies.append(_Copy(arrival, address, memory.address + offset, num_bytes, memory))
            self.log.append(Span(SpanKind.COPY, begin, arrival, (address,)))
            return FakeEvent(self, arrival)

    def mark(self) -> FakeEvent:
        """The end of the compute stream."""
        self.call()
        return FakeEvent(self, self._compute_time)

    def wait_for(self, event: Event) -> None:
        """Moves the compute stream's time there."""
        self.call()
        self._compute_time = max(self._compute_time, _time(event))

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Moves the host's time to the end of the compute stream."""
        self.call()
        self._compute_time = max(self._compute_time, self.host_time) + self._speed.trunk_seconds
        self.sync(self._compute_time)
        return tuple(tensor.clone() for tensor in tensors)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A clone, since the caller may go on to write."""
        self.call()
        return tensor.clone()

    def fill_slots_cached(self, slots: Tensor, routed: Routed, wave: CachedWave, /) -> None:
        """The reference, over what the slots hold at that moment of virtual time."""
        self.call()
        if not self._compiled:
            self._compiled = True
            self.host_time += self._speed.compile_seconds
        cache, places = wave.cache, wave.slot_of.tolist()
        wanted = {e for e in routed.index.flatten().tolist() if e < len(places)}
        experts = sorted(e for e in wanted if places[e] >= 0)
        begin = max(self._compute_time, self.host_time)
        with self.lock:
            self._deliver(begin)
        records = [places[e] * cache.shape[1] for e in experts]
        arena = ArenaTensors(cache.data_ptr(), cache.nbytes)
        fill_slots(slots, routed, Wave(experts, records, arena, wave.spec), row_by_row=wave.exact)
        num_bytes = len(experts) * wave.spec.layout.record_bytes
        self._compute_time = begin + num_bytes / self._speed.memory_bytes_per_second
        read = tuple(cache[places[e]].data_ptr() for e in experts)
        self._read_until.update(dict.fromkeys(read, self._compute_time))
        self.log.append(Span(SpanKind.COMPUTE, begin, self._compute_time, read))

    def recorder(self) -> FakeRecorder:
        """Which notes what torch is asked for, and repeats it."""
        return FakeRecorder()

    def in_step(self) -> AbstractContextManager[None]:
        """As on a GPU, whose switch is torch's own."""
        return without_cudnn_attention()

    def clock(self) -> float:
        """Virtual seconds."""
        self.call()
        return self.host_time

    def explain(self, error: BaseException) -> ExpertdError | None:
        """Nothing of torch's fails here."""
        return None

    def close(self) -> None:
        """Forgets its memory."""
        self._allocated.clear()

    # What a test may do to it, and what its parts need

    def lose(self) -> None:
        """From now on it does not answer."""
        self.lost = True

    def call(self) -> None:
        """Any call takes the host some time. Raises DeviceLostError."""
        if self.lost:
            raise DeviceLostError(
                f"{self.name} does not answer any more; look at the host's log for why, then start "
                "this worker again, or one without --device."
            )
        with self.lock:
            self.host_time += self._speed.call_seconds
            self._deliver(self.host_time)

    def sync(self, time: float) -> None:
        """The host waits until ``time``, and sees what has arrived by then."""
        self.num_syncs += 1
        self.log.append(Span(SpanKind.SYNC, self.host_time, max(time, self.host_time), ()))
        self.host_time = max(time, self.host_time)
        with self.lock:
            self._deliver(self.host_time)

    def check_idle(self, memory: FakeMemory) -> None:
        """Raises HazardError if a copy from ``memory`` is under way."""
        if any(copy.memory is memory for copy in self._copies):
            raise HazardError("host memory was let go of while a copy reads it")

    def _deliver(self, until: float) -> None:
        """Lets all copies arrive that have by then, in the order of their arrival.

        The host's time may be earlier. Until it has come as far, the source must not change.
        """
        for copy in sorted(self._copies, key=lambda copy: copy.arrival):
            if copy.arrival > until:
                break
            if copy.arrived is None:
                copy.arrived = copy.read()
                ctypes.memmove(copy.slot, copy.source, copy.num_bytes)
            if copy.arrival <= self.host_time:
                self._copies.remove(copy)
                if self.check_sources and copy.read() != copy.arrived:
                    raise HazardError("host memory was overwritten while a copy read it")


def _time(event: Event) -> float:
    assert isinstance(event, FakeEvent)
    return event.time


def offer_fake_devices(opened: list[FakeDevice] | None = None) -> None:
    """Lets this process's workers open ``fake`` and ``fake:0``, ``fake:1`` ...

    They are added to ``opened``.
    """

    def open_fake(name: str, say: Callable[[str], None] | None) -> FakeDevice:
        device = FakeDevice(name, say=say)
        if opened is not None:
            opened.append(device)
        return device

    DEVICE_KINDS["fake"] = open_fake

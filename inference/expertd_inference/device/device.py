"""What a worker needs of a GPU: the seam that CUDA implements, and a fake in tests.

Three lines of time run beside each other. The *host* calls; what it asks for is queued. The
*compute stream* does the model's work in the order in which it was called: trunk, kernels,
uploads. The *copy stream* brings records from host memory; copies may overlap the compute
stream and, as far as anyone may rely on it, complete in any order. Only events order one
against the other:

- :meth:`Device.copy` gives the event of its bytes' arrival; :meth:`Device.wait_for` makes what
  is computed from then on wait for it;
- :meth:`Device.mark` gives the event of all that is computed so far; a copy into a slot takes
  the mark of its last reader, so that it does not overwrite what is still being read.

Neither makes the host wait. :meth:`Device.to_host` does, and a layer needs it once, to read its
routing; ``num_syncs`` counts how often the host waited at all.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Protocol, Self

import torch
from torch import Tensor

from expertd_inference.device.recorder import GraphRecorder
from expertd_inference.kernels.wave import CachedWave, Routed
from expertstore.errors import ExpertdError


class CopyMode(StrEnum):
    """How a device reads a range of host memory."""

    REGISTERED = "registered"
    """Straight from it, by DMA: its pages are registered with the driver."""
    PARTIAL = "partial"
    """The driver registers a part of it; the rest is staged."""
    STAGED = "staged"
    """The driver refused it: by way of a small pinned ring of our own, which costs CPU time."""


class Event(Protocol):
    """A moment on one of a device's streams."""

    @property
    def done(self) -> bool:
        """Whether it has come to pass; does not wait. Raises DeviceLostError."""

    def wait(self) -> None:
        """Has the host wait for it; counted as a sync unless it is done. DeviceLostError."""

    def seconds_since(self, earlier: Self) -> float:
        """From ``earlier`` to this one on the device; both are done, and copies' events.

        What the link takes for a copy is learned from how far apart two arrivals are.
        """


class HostMemory(Protocol):
    """A range of this process's memory from which a device may copy, until :meth:`close`."""

    @property
    def mode(self) -> CopyMode:
        """How it is read."""

    @property
    def device_address(self) -> int:
        """Where kernels on the device read its beginning; 0 if they cannot."""

    def close(self) -> None:
        """Before the range is unmapped; no copy from it may be under way.

        Any thread may call it; a second call does nothing, and so does one for a lost device.
        """


class Device(Protocol):
    """One device. Used by one thread at a time, but for :meth:`HostMemory.close`.

    Every method raises DeviceLostError once the device does not answer.
    """

    name: str
    """As the user names it: ``cuda:0``."""
    hardware: str
    """What it is: measurements on one are good for others of that name."""
    torch_device: torch.device
    """Where tensors for it lie."""
    num_syncs: int
    """How often the host has waited for the device."""

    def free_bytes(self) -> int:
        """Memory that could be allocated now."""

    def allocate(self, num_slots: int, slot_bytes: int) -> Tensor:  # [num_slots, slot_bytes], uint8
        """Memory for records, of undefined content. Raises DeviceMemoryError.

        ``slot_bytes`` is a multiple of 4 KiB, and slots start on multiples of 256 bytes.
        """

    def register(self, address: int, num_bytes: int) -> HostMemory:
        """Makes a mapped range a source of copies. Never fails for being read-only: see CopyMode.

        The arena is one range; an implementation splits it if its driver wants smaller ones.
        """

    def copy(
        self,
        memory: HostMemory,
        offset: int,
        num_bytes: int,
        slot: Tensor,  # [slot_bytes], uint8, a row of allocate()'s
        after: Sequence[Event] = (),
    ) -> Event:
        """Queues a copy to the slot's beginning, to start once ``after`` have come to pass.

        Until its event the slot's bytes are undefined, and the source must stay what it is. Past
        ``memory`` it is other memory of this process, which has been read when this returns.
        """

    def mark(self) -> Event:
        """The moment at which all that was given to the compute stream is done."""

    def wait_for(self, event: Event) -> None:
        """Lets what is computed from now on begin after ``event``; the host does not wait."""

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copies on the CPU, once they are computed: the host waits, once for all of them."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy for the compute stream; the host does not wait, and may reuse ``tensor``."""

    def fill_slots_cached(self, slots: Tensor, routed: Routed, wave: CachedWave, /) -> None:
        """Queues the experts that have a slot of the cache: their results, into ``slots``.

        As ``kernels.cpu.reference.fill_slots`` does, into [T, k, H]; of a wave that is ``exact``
        row by row. All tensors lie on this device.
        """

    def recorder(self) -> GraphRecorder:
        """A recorder of work on this device."""

    def in_step(self) -> AbstractContextManager[None]:
        """Around a forward pass of which a part is computed here; for any thread."""

    def clock(self) -> float:
        """Seconds on the host's line of time; only differences mean anything."""

    def explain(self, error: BaseException) -> ExpertdError | None:
        """What an error of torch's on this device means to the user; None if nothing of ours."""

    def close(self) -> None:
        """Lets go of the device's memory; a second call does nothing."""

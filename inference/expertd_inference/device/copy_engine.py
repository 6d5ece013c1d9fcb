"""Copies records from the arena into one device's slots, in an order that is safe."""

from collections.abc import Iterable

import torch
from torch import Tensor

from expertd_inference.device.device import Device, Event, HostMemory
from expertd_inference.experts.source import HeldSource


class CopyEngine:
    """``slots`` are [num_slots, slot_bytes] on ``device``; the arena is that of ``source``."""

    def __init__(self, device: Device, slots: Tensor, source: HeldSource) -> None:
        self.slots = slots
        self._device = device
        self._source = source
        self._registered: _Registered | None = None
        # What a copy into the slot has to come after: its last copy, its last reader.
        self._last_copy: dict[int, Event] = {}
        self._last_read: dict[int, Event] = {}

    @property
    def mode(self) -> str:
        """How the device reads the arena; empty before the first copy."""
        return "" if self._registered is None else self._registered.memory.mode.value

    @property
    def device_address(self) -> int:
        """Where kernels read the arena that is attached now; 0 if they cannot."""
        self.attach()
        assert self._registered is not None
        return self._registered.memory.device_address

    def attach(self) -> None:
        """Registers the arena, unless it is; after the source has attached anew."""
        address, num_bytes = self._source.arena_address, self._source.arena_bytes
        if self._registered is not None:
            if self._registered.is_of(address, num_bytes):
                return
            self._registered.close()
        memory = self._device.register(address, num_bytes)
        self._registered = _Registered(memory, address, num_bytes)
        # The source is not to be kept alive by what it calls at its end.
        self._source.before_unmapping(self._registered.close)

    def copy(self, slot: int, offset: int, num_bytes: int) -> Event:
        """Queues the copy of a record, after whatever the slot is still used for."""
        if self._registered is None or self._registered.closed:
            self.attach()
        assert self._registered is not None
        before = (self._last_copy.get(slot), self._last_read.get(slot))
        event = self._device.copy(
            self._registered.memory,
            offset,
            num_bytes,
            self.slots[slot],
            after=[each for each in before if each is not None],
        )
        self._last_copy[slot] = event
        return event

    def arrival(self, slot: int) -> Event:
        """The event of the last copy into a slot."""
        return self._last_copy[slot]

    def read(self, slots: Iterable[int]) -> None:
        """A kernel that reads ``slots`` was just queued."""
        mark = self._device.mark()
        for slot in slots:
            self._last_read[slot] = mark

    def close(self) -> None:
        """Lets go of the arena and of the slots; the source may go on."""
        if self._registered is not None:
            self._registered.close()
        self.slots = torch.empty(0, dtype=torch.uint8)
        self._last_copy.clear()
        self._last_read.clear()


class _Registered:
    """A range that is registered, until somebody closes it: we, or the source's end."""

    def __init__(self, memory: HostMemory, address: int, num_bytes: int) -> None:
        self.memory, self.closed = memory, False
        self._range = (address, num_bytes)

    def is_of(self, address: int, num_bytes: int) -> bool:
        return not self.closed and self._range == (address, num_bytes)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.memory.close()


class SlotUpload:
    """Makes the device's table of which expert of a layer is in which slot."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tables: dict[int, Tensor] = {}

    def upload(self, num_experts: int, places: Iterable[tuple[int, int]]) -> Tensor:
        """``places`` are experts and slots; int32 [num_experts], -1 elsewhere."""
        table = self._tables.get(num_experts)
        if table is None:
            table = self._tables[num_experts] = torch.empty(num_experts, dtype=torch.int32)
        table.fill_(-1)
        for expert, slot in places:
            table[expert] = slot
        return self._device.to_device(table)

"""A CUDA runtime for machines without a GPU: the calls' rules, kept on real memory.

What it refuses, a driver refuses: memory that is not mapped, or that could not be written to
unless it is registered as read-only and the device knows that; ranges that overlap or are too
large; a copy that begins in one registered range and ends in another. A failed call leaves its
code behind, as the real one does. Queued copies read their source when the stream gets to them
(:meth:`FakeCudart.run`), not when they are queued.
"""

import ctypes
from pathlib import Path

from expertd_inference.device.cudart import (
    ATTRIBUTE_HOST_REGISTER,
    ATTRIBUTE_READ_ONLY_REGISTER,
    REGISTER_READ_ONLY,
    SUCCESS,
)

INVALID_VALUE, OUT_OF_MEMORY, NOT_REGISTERED, ALREADY_REGISTERED, LOST = 1, 2, 713, 712, 999
_WORDS = {
    INVALID_VALUE: "invalid argument",
    OUT_OF_MEMORY: "out of memory",
    NOT_REGISTERED: "part or all of the requested memory range is not registered",
    ALREADY_REGISTERED: "part or all of the requested memory range is already mapped",
    LOST: "unknown error",
}


class FakeCudart:
    """Devices, which ``reads_only`` register read-only memory if asked to.

    ``offset`` is how far from the host's address they see memory. ``max_bytes`` may be registered
    altogether, as under WSL; with ``registers`` false nothing can be.
    """

    def __init__(
        self,
        *,
        reads_only: bool = True,
        max_range_bytes: int = 512 << 30,
        offset: int = 0,
        max_bytes: int = 1 << 60,
        registers: bool = True,
        num_devices: int = 1,
    ) -> None:
        self.registered: dict[int, int] = {}
        """Sizes by address."""
        self.lost = False
        self.current = 0
        """This thread's device."""
        self._max_bytes, self._registers, self._num_devices = max_bytes, registers, num_devices
        self._reads_only, self._max_range_bytes, self._offset = reads_only, max_range_bytes, offset
        self._last_error = SUCCESS
        self._queue: list[tuple[int, int, int]] = []

    def set_device(self, index: int) -> int:
        """Unless there is no such one."""
        if not 0 <= index < self._num_devices:
            return self._ended(INVALID_VALUE)
        self.current = index
        return self._ended(SUCCESS)

    def current_device(self) -> int:
        """The first, until another is set."""
        return self.current

    def restore_device(self, index: int) -> None:
        """Never fails."""
        self.current = index

    def attribute(self, attribute: int, index: int) -> int:
        """The two that matter here."""
        return int(
            (attribute == ATTRIBUTE_HOST_REGISTER and self._registers)
            or (attribute == ATTRIBUTE_READ_ONLY_REGISTER and self._reads_only)
        )

    def register(self, address: int, num_bytes: int, flags: int) -> int:
        """Refuses what a driver refuses."""
        if num_bytes > self._max_range_bytes or not num_bytes:
            return self._ended(INVALID_VALUE)
        if flags & REGISTER_READ_ONLY and not self._reads_only:
            return self._ended(INVALID_VALUE)
        if not self._registers:
            return self._ended(INVALID_VALUE)
        if sum(self.registered.values()) + num_bytes > self._max_bytes:
            return self._ended(OUT_OF_MEMORY)
        if not _mapped(address, num_bytes, writable=not flags & REGISTER_READ_ONLY):
            return self._ended(INVALID_VALUE)
        for start, size in self.registered.items():
            if address < start + size and start < address + num_bytes:
                return self._ended(ALREADY_REGISTERED)
        if self.lost:
            return self._ended(LOST)
        self.registered[address] = num_bytes
        return self._ended(SUCCESS)

    def unregister(self, address: int) -> int:
        """Of a range that was registered, and is still mapped."""
        size = self.registered.get(address)
        if size is None or not _mapped(address, size, writable=False):
            return self._ended(NOT_REGISTERED)
        del self.registered[address]
        return self._ended(SUCCESS)

    def device_address(self, address: int) -> int:
        """At ``offset`` from there, if it is registered."""
        if any(start <= address < start + size for start, size in self.registered.items()):
            return address + self._offset
        self._ended(INVALID_VALUE)
        return 0

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        """Queues it, unless it crosses the end of a registered range."""
        end = source + num_bytes
        for start, size in self.registered.items():
            inside = start <= source < start + size, start < end <= start + size
            if inside[0] != inside[1]:
                return self._ended(INVALID_VALUE)
        self._queue.append((target, source, num_bytes))
        return self._ended(SUCCESS)

    def last_error(self) -> int:
        """Forgets it, unless the device is lost."""
        code, self._last_error = self._last_error, LOST if self.lost else SUCCESS
        return code

    def describe(self, code: int) -> str:
        """In the driver's words."""
        return f"{_WORDS.get(code, 'no error')} ({code})"

    def fail(self, code: int) -> None:
        """Something else on the device has failed, and nobody has asked yet."""
        self._last_error = code

    def run(self, num_copies: int | None = None) -> None:
        """The stream gets on: the first ``num_copies`` of the queue, or all."""
        count = len(self._queue) if num_copies is None else num_copies
        done, self._queue = self._queue[:count], self._queue[count:]
        for target, source, size in done:
            ctypes.memmove(target, source, size)

    @property
    def num_queued(self) -> int:
        """Copies that the stream has not come to."""
        return len(self._queue)

    def _ended(self, code: int) -> int:
        if self.lost:
            code = LOST
        if code != SUCCESS:
            self._last_error = code
        return code


def _mapped(address: int, num_bytes: int, *, writable: bool) -> bool:
    """Whether all of it is mapped, and so."""
    end = address + num_bytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, flags = line.split()[:2]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= address < high and "r" in flags and (not writable or "w" in flags):
            address = high
            if address >= end:
                return True
    return False

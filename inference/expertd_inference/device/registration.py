"""Registering mapped host memory with the CUDA driver, so that the device reads it by DMA.

A few large ranges: the driver refuses very large ones, and very many. The arena is mapped
read-only; some devices register such memory, others only what could be written to. For these it
is made writable while it is registered, if the daemon has given this user a descriptor that
allows it (``writable_uids`` in its configuration), and read-only again at once: registered pages
stay registered. What is refused leaves no error behind for the next kernel to be blamed for, and
what had failed before is not blamed on us.
"""

import ctypes
from pathlib import Path

from expertd.errors import DeviceError, DeviceLostError
from expertd.sizes import format_bytes
from expertd_inference.device.cudart import (
    ATTRIBUTE_READ_ONLY_REGISTER,
    REGISTER_MAPPED,
    REGISTER_PORTABLE,
    REGISTER_READ_ONLY,
    SUCCESS,
    Runtime,
)

RANGE_BYTES = 64 << 30
"""The largest range of one call: recent drivers fail at 512 GiB, and progress can be shown."""


_READ, _WRITE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """The driver does not register this memory; the reason is its own."""


class Registration:
    """``num_bytes`` from ``address`` on, registered until :meth:`close`; for all devices.

    ``device_address`` is where kernels see its beginning, 0 if they cannot read it as one piece.
    ``read_only`` says whether it was registered as read-only. Raises :class:`RefusedError` with
    nothing registered, DeviceLostError if the device does not answer.
    """

    def __init__(
        self,
        runtime: Runtime,
        index: int,
        address: int,
        num_bytes: int,
        *,
        range_bytes: int = RANGE_BYTES,
    ) -> None:
        self._runtime, self._index = runtime, index
        self.address, self.num_bytes = address, num_bytes
        self.read_only = False
        self._registered: list[int] = []
        self._range_bytes = range_bytes
        check(runtime, runtime.set_device(index), "choosing the device", lost=True)
        # What failed before was said to whoever asked for it; what comes again is the device's end.
        runtime.last_error()
        check(runtime, runtime.last_error(), "an earlier operation", lost=True)
        self._register()
        self.device_address = self._seen_at()

    def pieces(self, offset: int, num_bytes: int) -> list[tuple[int, int]]:
        """The part of the memory as (offset, bytes) that lie in one range each.

        A copy from two ranges at once is an error to the driver.
        """
        pieces, end = [], offset + num_bytes
        while offset < end:
            stop = min(end, (offset // self._range_bytes + 1) * self._range_bytes)
            pieces.append((offset, stop - offset))
            offset = stop
        return pieces

    def close(self) -> None:
        """Before the memory is unmapped; a second call does nothing."""
        registered, self._registered = self._registered, []
        if registered:
            self._runtime.set_device(self._index)
        for address in registered:
            if self._runtime.unregister(address) != SUCCESS:
                self._runtime.last_error()  # a lost device keeps nothing; nobody else's to find

    def _register(self) -> None:
        plain = REGISTER_PORTABLE | REGISTER_MAPPED
        if is_writable(self.address):
            if reason := self._attempt(plain):
                raise RefusedError(reason)
            return
        if self._runtime.attribute(ATTRIBUTE_READ_ONLY_REGISTER, self._index):
            self.read_only = not (reason := self._attempt(plain | REGISTER_READ_ONLY))
        else:
            # A driver that takes it is right to.
            reason = self._attempt(plain)
        if not reason:
            return
        if not _protect(self.address, self.num_bytes, _READ | _WRITE):
            raise RefusedError(reason)
        try:
            if reason := self._attempt(plain):
                raise RefusedError(reason)
        finally:
            _protect(self.address, self.num_bytes, _READ)

    def _attempt(self, flags: int) -> str:
        """Why it was refused; empty if it was not."""
        code = self._register_all(flags)
        if code == SUCCESS:
            return ""
        # Twice: what comes again is no refusal but the end of the device.
        self._runtime.last_error()
        check(self._runtime, self._runtime.last_error(), "registering memory", lost=True)
        return self._runtime.describe(code)

    def _register_all(self, flags: int) -> int:
        for start, size in self.pieces(0, self.num_bytes):
            code = self._runtime.register(self.address + start, size, flags)
            if code != SUCCESS:
                self.close()
                return code
            self._registered.append(self.address + start)
        return SUCCESS

    def _seen_at(self) -> int:
        """One address for all ranges, or 0."""
        starts = [start for start, _ in self.pieces(0, self.num_bytes)]
        seen = [self._runtime.device_address(self.address + start) for start in starts]
        together = all(
            place and place - start == seen[0] for start, place in zip(starts, seen, strict=True)
        )
        return seen[0] if together else 0


def check(runtime: Runtime, code: int, doing: str, *, lost: bool = False) -> None:
    """Raises DeviceError, or DeviceLostError, unless ``code`` is success."""
    if code == SUCCESS:
        return
    kind = DeviceLostError if lost else DeviceError
    raise kind(
        f"The GPU failed at {doing}: {runtime.describe(code)}; look at the host's log (dmesg, "
        "nvidia-smi) for why, then start this worker again."
    )


def is_writable(address: int) -> bool:
    """Whether this process may write to the mapping at ``address``."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, flags = line.split()[:2]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= address < high:
            return "w" in flags
    raise ValueError(f"nothing is mapped at {address:#x}")


def _protect(address: int, num_bytes: int, protection: int) -> bool:
    """Whether the mapping now has that protection; it has to allow it."""
    code: int = _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), protection)
    return code == 0


def explain_refusal(reason: str, num_bytes: int) -> str:
    """What to tell the user, once."""
    return (
        f"the GPU's driver does not register the {format_bytes(num_bytes)} of shared memory "
        f"({reason}): copies go through a pinned buffer, slower and at the cost of CPU time; name "
        "this user in the daemon's writable_uids if the driver wants writable memory."
    )

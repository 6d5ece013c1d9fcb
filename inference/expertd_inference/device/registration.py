"""Registering mapped host memory with the CUDA driver, so that the device reads it by DMA.

A few large ranges: the driver refuses very large ones, and very many. The arena is mapped
read-only; some devices register such memory, others only what could be written to. For these it
is made writable while it is registered, if the daemon has given this user a descriptor that
allows it (its own user, and ``writable_uids`` in its configuration), and read-only again at once:
registered pages stay registered. A driver that grants less than all (WSL's does) registers the
beginning. What is refused leaves no error behind for the next kernel to be blamed for, and what
had failed before is not blamed on us.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from expertd_inference.device.cudart import (
    ATTRIBUTE_HOST_REGISTER,
    ATTRIBUTE_READ_ONLY_REGISTER,
    REGISTER_MAPPED,
    REGISTER_PORTABLE,
    REGISTER_READ_ONLY,
    SUCCESS,
    Cudart,
    Runtime,
)
from expertstore.errors import DeviceError, DeviceLostError
from expertstore.sizes import format_bytes

RANGE_BYTES = 64 << 30
"""The largest range of one call: recent drivers fail at 512 GiB, and progress can be shown."""

MIN_RANGE_BYTES = 256 << 20
"""What is refused is tried again by halves, down to this: a range more is worth so much."""


_READ, _WRITE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


NAME_USER = (
    "; if the driver wants writable memory, name this user in the daemon's writable_uids, or run "
    "this worker as the daemon's user"
)


class RefusedError(Exception):
    """The driver does not register this memory; the reason is its own, or what to do about it."""


class ArenaPiece(NamedTuple):
    """A part of some memory that one copy may take."""

    offset: int
    num_bytes: int
    is_registered: bool


class Registration:
    """``num_bytes`` from ``address`` on, or their beginning, registered until :meth:`close`.

    For all devices. ``read_only`` says whether it was registered as read-only; ``reason`` is why
    only ``registered_bytes`` are registered, empty if all are. Raises :class:`RefusedError` with
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
        min_range_bytes: int = MIN_RANGE_BYTES,
    ) -> None:
        self._runtime, self._index = runtime, index
        self.address, self.num_bytes = address, num_bytes
        self.read_only = False
        self.reason = ""
        self._sizes: list[int] = []
        """Of the ranges that are registered, each where the one before ends."""
        self._range_bytes, self._min_range_bytes = range_bytes, min_range_bytes
        with on_device(runtime, index):
            # What failed before was said to whoever asked for it; what comes again is the
            # device's end.
            runtime.last_error()
            check(runtime, runtime.last_error(), "an earlier operation", lost=True)
            self._register()

    @property
    def registered_bytes(self) -> int:
        """How much is registered, from the beginning."""
        return sum(self._sizes)

    def pieces(self, offset: int, num_bytes: int) -> list[ArenaPiece]:
        """The part of the memory as pieces that lie in one range each, or in none.

        A copy from two ranges at once is an error to the driver.
        """
        pieces, end, start = [], offset + num_bytes, 0
        for size in self._sizes:
            if offset < min(end, start + size):
                stop = min(end, start + size)
                pieces.append(ArenaPiece(offset, stop - offset, is_registered=True))
                offset = stop
            start += size
        if offset < end:
            pieces.append(ArenaPiece(offset, end - offset, is_registered=False))
        return pieces

    def device_address(self, index: int) -> int:
        """Where the kernels of a device see its beginning; 0 unless they see all in one piece."""
        if self.registered_bytes < self.num_bytes:
            return 0
        first = start = 0
        with on_device(self._runtime, index):
            for size in self._sizes:
                place = self._runtime.device_address(self.address + start)
                first = first or place
                if not place or place - start != first:
                    return 0
                start += size
        return first

    def close(self) -> None:
        """Before the memory is unmapped; a second call does nothing."""
        sizes, self._sizes = self._sizes, []
        if not sizes:
            return
        # A lost device keeps nothing, and the error is nobody else's to find.
        with on_device(self._runtime, self._index, is_needed=False):
            start = self.address
            for size in sizes:
                if self._runtime.unregister(start) != SUCCESS:
                    self._runtime.last_error()
                start += size

    def _register(self) -> None:
        if not self._runtime.attribute(ATTRIBUTE_HOST_REGISTER, self._index):
            raise RefusedError("this GPU registers no host memory")
        plain = REGISTER_PORTABLE | REGISTER_MAPPED
        if is_writable(self.address):
            self._take(plain)
        elif self._runtime.attribute(ATTRIBUTE_READ_ONLY_REGISTER, self._index):
            self._take(plain | REGISTER_READ_ONLY)
            self.read_only = bool(self._sizes)
        else:
            # A driver that takes it is right to.
            self._take(plain)
        if self._sizes:
            return
        remedy = ""
        if _protect(self.address, self.num_bytes, _READ | _WRITE):
            try:
                self._take(plain)
            finally:
                _protect(self.address, self.num_bytes, _READ)
        elif not is_writable(self.address):
            remedy = NAME_USER
        if not self._sizes:
            raise RefusedError(self.reason + remedy)

    def _take(self, flags: int) -> None:
        """Registers all, or as much as is granted, and notes why not more."""
        end, most, self.reason = 0, self._range_bytes, ""
        while end < self.num_bytes:
            size = min(most, self.num_bytes - end)
            code = self._runtime.register(self.address + end, size, flags)
            if code == SUCCESS:
                self._sizes.append(size)
                end += size
                continue
            self.reason = self._refusal(code)
            if size <= self._min_range_bytes:
                return
            most = max(self._min_range_bytes, most // 2)
        self.reason = ""

    def _refusal(self, code: int) -> str:
        # Twice: what comes again is no refusal but the end of the device.
        self._runtime.last_error()
        try:
            check(self._runtime, self._runtime.last_error(), "registering memory", lost=True)
        except DeviceLostError:
            self._sizes.clear()
            raise
        return self._runtime.describe(code)


class Registrations:
    """What a process has registered: each range once, for all of its devices and workers.

    The driver refuses a range that is registered already, whoever asks.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._lock = threading.Lock()
        self._shared: dict[tuple[int, int], tuple[Registration, int]] = {}
        """By address and bytes; with how many hold it."""

    def __repr__(self) -> str:
        return f"<Registrations of {len(self._shared)} ranges>"

    def take(self, index: int, address: int, num_bytes: int) -> Registration:
        """That of the range, to be given back. Raises as :class:`Registration`."""
        key = address, num_bytes
        with self._lock:
            registration, num_holders = self._shared.get(key, (None, 0))
            if registration is None:
                registration = Registration(self.runtime, index, address, num_bytes)
            self._shared[key] = registration, num_holders + 1
            return registration

    def give_back(self, registration: Registration) -> None:
        """The last holder's unregisters it."""
        key = registration.address, registration.num_bytes
        with self._lock:
            _, num_holders = self._shared.pop(key)
            if num_holders > 1:
                self._shared[key] = registration, num_holders - 1
            else:
                registration.close()


@cache
def registrations() -> Registrations:
    """This process's. Raises DeviceError without a CUDA runtime."""
    return Registrations(Cudart())


@contextmanager
def on_device(runtime: Runtime, index: int, *, is_needed: bool = True) -> Iterator[None]:
    """With that device this thread's, which has its own again afterwards.

    Raises DeviceLostError if it cannot be had, unless ``is_needed`` is false.
    """
    before = runtime.current_device()
    code = runtime.set_device(index)
    if is_needed:
        check(runtime, code, "choosing the device", lost=True)
    try:
        yield
    finally:
        runtime.restore_device(before)


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


def explain_refusal(reason: str, num_bytes: int, registered_bytes: int = 0) -> str:
    """What to tell the user, once; of ``num_bytes`` only so many are registered."""
    total = format_bytes(num_bytes)
    if registered_bytes:
        return (
            f"the GPU's driver registers {format_bytes(registered_bytes)} of the {total} of shared "
            f"memory ({reason}): copies of the rest go through a pinned buffer, slower and at the "
            "cost of CPU time."
        )
    return (
        f"the GPU's driver does not register the {total} of shared memory ({reason}): copies go "
        "through a pinned buffer, slower and at the cost of CPU time."
    )

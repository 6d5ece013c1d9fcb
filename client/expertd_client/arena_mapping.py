"""The arena in this process's memory, which more than one session may use in turn."""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable

from expertd.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer

_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
_libc = ctypes.CDLL(None)
_PY_BUFFER_BYTES = 128  # More than a Py_buffer has; its first member is the address.


class ArenaMapping:
    """The arena, mapped read-only; outlives a session if the next one's arena is the same.

    Its address then stays too, and with it whatever was registered or derived from it.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Raises ValueError if it is not an arena with ``num_bytes`` of records."""
        self.identity = _identity(descriptor)
        mapped = mmap.mmap(descriptor, num_bytes + TRAILER_BYTES, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_DONTDUMP)  # a crash must not write the host's copy to disk
        self.address = address_of(mapped)
        everything = memoryview(mapped)
        self.records = everything[:num_bytes]
        self.trailer = ArenaTrailer(everything[num_bytes:].cast("Q"))

    def before_unmapping(self, call: Callable[[], None]) -> None:
        """Has ``call`` called once nobody uses this mapping, and while it is still mapped."""
        # A finalizer runs before the attributes go, and with them the memory.
        weakref.finalize(self, call).atexit = False

    def enter_pages(self, extents: Iterable[tuple[int, int]]) -> threading.Thread:
        """Has a thread enter these (offset, bytes) into this process's page table; it is returned.

        They must be in memory: what is not there would be made. Before Linux 5.14 nothing happens.
        The mapping lives no longer for it.
        """
        thread = threading.Thread(
            target=_enter_pages,
            args=(weakref.ref(self), [*extents]),
            name="expertd-page-table",
            daemon=True,
        )
        thread.start()
        return thread

    def is_of(self, descriptor: int, num_bytes: int) -> bool:
        """Whether it maps that very file, and as much of it."""
        return _identity(descriptor) == self.identity and len(self.records) == num_bytes


def _enter_pages(mapping: "weakref.ref[ArenaMapping]", extents: Iterable[tuple[int, int]]) -> None:
    for offset, num_bytes in extents:
        mapped = mapping()
        if mapped is None:
            return
        # ctypes lets go of the interpreter's lock meanwhile.
        address, size = ctypes.c_void_p(mapped.address + offset), ctypes.c_size_t(num_bytes)
        if _libc.madvise(address, size, _MADV_POPULATE_READ):
            return
        del mapped


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def address_of(mapped: mmap.mmap) -> int:
    """Where ``mapped`` lies in this process.

    ctypes' own from_buffer wants a writable buffer, so this asks the interpreter.
    """
    buffer = (ctypes.c_void_p * (_PY_BUFFER_BYTES // 8))()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(buffer), 0)
    address = buffer[0]
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    if address is None:
        raise ValueError("an empty mapping has no address")
    return address

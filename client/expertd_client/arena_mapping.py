"""The arena in this process's memory, which more than one session may use in turn."""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable

from expertd_client.annex import Annex
from expertstore.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer
from expertstore.shared.directory import PAGE_BYTES

_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
_PROT_NONE, _PROT_READ, _MAP_SHARED, _MAP_FIXED = 0, 1, 1, 16
_ALIGNMENT = 2 << 20
"""Of the arena: a mapping at another address has no huge pages."""
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_PY_BUFFER_BYTES = 128  # More than a Py_buffer has; its first member is the address.


class ArenaMapping:
    """The arena, mapped read-only; outlives a session if the next one's arena is the same.

    Its address then stays too, and with it whatever was registered or derived from it.
    Behind it there is an annex of this process's own, so that a record in either is so many bytes
    from one address: ``everything``.
    """

    def __init__(self, descriptor: int, num_bytes: int, annex_bytes: int = 0) -> None:
        """Raises ValueError if it is not an arena with ``num_bytes`` of records, OSError.

        Where the system refuses so much address space, there is no annex.
        """
        self.identity = _identity(descriptor)
        size = num_bytes + TRAILER_BYTES
        annex = _round_up(size, PAGE_BYTES)
        try:
            reserved = _reserve(annex + annex_bytes)
        except OSError:
            annex_bytes = 0
            reserved = _reserve(size)
        begin = _round_up(address_of(reserved), _ALIGNMENT) - address_of(reserved)
        self.address = address_of(reserved) + begin
        _map_over(self.address, size, descriptor)
        reserved.madvise(mmap.MADV_DONTDUMP)  # a crash must not write the host's copy to disk
        self.everything = memoryview(reserved)[begin : begin + annex + annex_bytes]
        self.records = self.everything[:num_bytes]
        self.trailer = ArenaTrailer(self.everything[num_bytes:size].cast("Q"))
        self.annex = Annex(reserved, address_of(reserved), begin + annex, annex_bytes)
        self.annex_offset = annex

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


def _reserve(num_bytes: int) -> mmap.mmap:
    """Addresses for so many bytes that begin at a multiple of the alignment; no memory yet.

    The object unmaps them, and what is mapped over them, when nothing refers to it any more.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return mmap.mmap(-1, num_bytes + _ALIGNMENT, flags=flags, prot=_PROT_NONE)


def _map_over(address: int, num_bytes: int, descriptor: int) -> None:
    """Maps a file read-only in place of what was mapped at ``address``. Raises OSError."""
    flags = _MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address, num_bytes, _PROT_READ, flags, descriptor, 0) == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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

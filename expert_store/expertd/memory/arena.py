"""The arena: the one copy of all resident records, shared, prefaulted and locked."""

import ctypes
import errno
import mmap
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from expertd.log import log, log_warning
from expertd.memory.extents import Extent
from expertd.memory.memfd import SharedMemory
from expertstore.errors import ConfigError, ShortMemoryError
from expertstore.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer
from expertstore.shared.host_memory import memory_available, memory_total
from expertstore.sizes import format_bytes

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_PREFAULT_BYTES = 64 << 20
_PROGRESS_SECONDS = 2.0
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Shared memory for ``num_bytes`` of records, rounded down to 4 KiB, and its trailer.

    ``memory``: that of an earlier daemon, which this one takes over as it is. ``locked_bytes``
    and ``huge_page_bytes`` say what was really obtained, ``warnings`` why it was less. Raises
    :class:`ConfigError` if the host does not have that much.
    """

    def __init__(self, num_bytes: int, *, lock: bool, memory: SharedMemory | None = None) -> None:
        num_bytes = arena_bytes(num_bytes)
        self.warnings: list[str] = []
        self.num_bytes = num_bytes
        if memory is None:
            check_memory(num_bytes)
            self.memory = SharedMemory("expertd-arena", num_bytes + TRAILER_BYTES, mode=0o400)
            self.trailer = ArenaTrailer.format(trailer_words(self.memory))
        else:
            self.memory = memory
            self.trailer = ArenaTrailer(trailer_words(memory))
            self.trailer.adopt()
        self._anchor = ctypes.c_char.from_buffer(self.memory.view)
        self._address = ctypes.addressof(self._anchor)
        self._advise_huge_pages()
        self._prefault()
        self.locked_bytes = self._lock() if lock else 0
        self.huge_page_bytes = self._count_huge_pages()
        if not self.huge_page_bytes:
            self.warnings.append(
                "the arena has no huge pages: /sys/kernel/mm/transparent_hugepage/shmem_enabled "
                "does not offer them (write 'advise' there)."
            )

    @property
    def view(self) -> memoryview:
        """The bytes of all records, to be read."""
        return self.memory.view[: self.num_bytes].toreadonly()

    def writable(self, extent: Extent) -> memoryview:
        """Where to write a record: the one way to bytes that workers may have read.

        Sessions of earlier daemons are void from now on: nobody waits for their readers.
        """
        self.trailer.begin_reuse()
        return self.memory.view[extent.offset : extent.offset + extent.num_bytes]

    def copy(self, source: Extent, target: Extent) -> None:
        """Copies a record's bytes; from any thread, and without holding the interpreter up."""
        start, size = source
        there = np.frombuffer(self.writable(target), np.uint8)
        np.copyto(there, np.frombuffer(self.view[start : start + size], np.uint8))

    def close(self) -> None:
        """Gives the memory back; workers that map it keep their mappings. Twice is harmless."""
        for view in ("_anchor", "trailer"):  # they would keep the mapping from being closed
            self.__dict__.pop(view, None)
        self.memory.close()

    def _advise_huge_pages(self) -> None:
        advice = mmap.MADV_HUGEPAGE
        _libc.madvise(
            ctypes.c_void_p(self._address), ctypes.c_size_t(self.memory.num_bytes), advice
        )

    def _prefault(self) -> None:
        """Touches every page now, in parallel, so that no reader or DMA waits for a fault."""

        def populate(start: int) -> int:
            length = min(_PREFAULT_BYTES, self.memory.num_bytes - start)
            failed: int = _libc.madvise(
                ctypes.c_void_p(self._address + start),
                ctypes.c_size_t(length),
                _MADV_POPULATE_WRITE,
            )
            return ctypes.get_errno() if failed else 0

        errors, said = {0}, time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            starts = range(0, self.memory.num_bytes, _PREFAULT_BYTES)
            for start, error in zip(starts, pool.map(populate, starts), strict=True):
                errors.add(error)
                if time.monotonic() > said + _PROGRESS_SECONDS:
                    said = time.monotonic()
                    done, total = format_bytes(start), format_bytes(self.num_bytes)
                    log("preparing the arena", done=done, of=total)
        errors -= {0}
        if errors - {errno.EINVAL}:  # EINVAL: an older kernel; mlock or first use faults then
            reason = os.strerror((errors - {errno.EINVAL}).pop())
            self.close()
            raise ConfigError(
                f"the host could not provide {format_bytes(self.num_bytes)} of RAM ({reason}); "
                "give a smaller --ram."
            )

    def _lock(self) -> int:
        if not _libc.mlock(ctypes.c_void_p(self._address), ctypes.c_size_t(self.memory.num_bytes)):
            return self.num_bytes
        reason = os.strerror(ctypes.get_errno())
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
        self.warnings.append(
            f"the arena is not locked in RAM ({reason}; RLIMIT_MEMLOCK is {allowed}): the host "
            "may swap it out; raise LimitMEMLOCK or `ulimit -l`."
        )
        return 0

    def _count_huge_pages(self) -> int:
        return huge_page_bytes("expertd-arena")


def arena_bytes(ram_bytes: int) -> int:
    """How much of a budget records can use: whole pages."""
    return ram_bytes - ram_bytes % mmap.PAGESIZE


def trailer_words(memory: SharedMemory) -> memoryview:
    """The last page of an arena's memory, as :class:`ArenaTrailer` wants it.

    Raises ValueError if it is not made of whole pages.
    """
    if memory.num_bytes % TRAILER_BYTES:
        raise ValueError("it is not made of whole pages")
    return memory.view[-TRAILER_BYTES:].cast("Q")


def discard_contents(memory: SharedMemory) -> None:
    """Gives back the RAM of an arena that nobody will serve from, though workers still map it.

    They read zeros from then on, and the trailer, which stays, tells them not to believe it.
    """
    ArenaTrailer(trailer_words(memory)).retire()
    length = memory.num_bytes - TRAILER_BYTES
    mode = ctypes.c_int(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE)
    if _libc.fallocate(memory.fd, mode, ctypes.c_int64(0), ctypes.c_int64(length)):
        log_warning("cannot give an arena back", cause=os.strerror(ctypes.get_errno()))


def huge_page_bytes(mapping: str) -> int:
    """How much of this process's mapping of that memfd is backed by huge pages."""
    counted, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            ours = f"memfd:{mapping}" in line
        elif ours and line.startswith(("ShmemPmdMapped:", "FilePmdMapped:")):
            counted += int(line.split()[1]) << 10
    return counted


def check_memory(num_bytes: int) -> None:
    """Raises :class:`ConfigError` if the host or its cgroup cannot hold that much.

    It is a :class:`ShortMemoryError` if they could, were it not for what others use now. Locking
    more than there is makes the kernel kill processes, ours or others.
    """
    total = memory_total()
    if num_bytes > total:
        raise ConfigError(
            f"the RAM budget is {format_bytes(num_bytes)}, but there are only "
            f"{format_bytes(total)} here (RAM, and the cgroup's limit); give a smaller --ram."
        )
    available = memory_available()
    if num_bytes > available:
        raise ShortMemoryError(
            f"the RAM budget is {format_bytes(num_bytes)}, but of {format_bytes(total)} here only "
            f"{format_bytes(available)} are free; end what uses them, or give a smaller --ram."
        )

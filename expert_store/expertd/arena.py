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

from expertd.errors import ConfigError
from expertd.extents import Extent
from expertd.host_memory import memory_available
from expertd.log import log
from expertd.memfd import SharedMemory
from expertd.sizes import format_bytes

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_PREFAULT_BYTES = 64 << 20
_PROGRESS_SECONDS = 2.0
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Shared memory for ``num_bytes`` of records, rounded down to 4 KiB.

    ``locked_bytes`` and ``huge_page_bytes`` say what was really obtained, ``warnings`` why
    it was less. Raises :class:`ConfigError` if the host does not have that much.
    """

    def __init__(self, num_bytes: int, *, lock: bool) -> None:
        num_bytes -= num_bytes % mmap.PAGESIZE
        check_memory(num_bytes)
        self.warnings: list[str] = []
        self.memory = SharedMemory("expertd-arena", num_bytes, mode=0o400)
        self.num_bytes = num_bytes
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
        """All bytes, writable."""
        return self.memory.view

    def copy(self, source: Extent, target: Extent) -> None:
        """Copies a record's bytes; from any thread, and without holding the interpreter up."""
        start, size = source
        array = np.frombuffer(self.view, np.uint8)
        np.copyto(array[target.offset : target.offset + size], array[start : start + size])

    def close(self) -> None:
        """Gives the memory back; workers that map it keep their mappings. Twice is harmless."""
        self.__dict__.pop("_anchor", None)  # it would keep the mapping from being closed
        self.memory.close()

    def _advise_huge_pages(self) -> None:
        advice = mmap.MADV_HUGEPAGE
        _libc.madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(self.num_bytes), advice)

    def _prefault(self) -> None:
        """Touches every page now, in parallel, so that no reader or DMA waits for a fault."""

        def populate(start: int) -> int:
            length = min(_PREFAULT_BYTES, self.num_bytes - start)
            failed: int = _libc.madvise(
                ctypes.c_void_p(self._address + start),
                ctypes.c_size_t(length),
                _MADV_POPULATE_WRITE,
            )
            return ctypes.get_errno() if failed else 0

        errors, said = {0}, time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            starts = range(0, self.num_bytes, _PREFAULT_BYTES)
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
        if not _libc.mlock(ctypes.c_void_p(self._address), ctypes.c_size_t(self.num_bytes)):
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

    Locking more than there is makes the kernel kill processes, ours or others.
    """
    available = memory_available()
    if num_bytes > available:
        raise ConfigError(
            f"the RAM budget is {format_bytes(num_bytes)}, but only {format_bytes(available)} are "
            "available here (free memory, and the cgroup's limit); give a smaller --ram."
        )

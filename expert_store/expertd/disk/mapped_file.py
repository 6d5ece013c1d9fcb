"""A file of a pack that is mapped: records are read by way of the page cache.

Nothing here touches a mapped byte. A page of a file that was cut short, or that the disk cannot
read, would end the daemon by SIGBUS; the kernel, asked to copy it, answers EFAULT, and one record
is lost. So the pages of a record are first brought in (``MADV_POPULATE_READ``) and then copied to
the arena by ``process_vm_readv`` from this process to itself, where the checksum is computed. Then
they are given up here (``MADV_DONTNEED``), and in the page cache when its bound says so.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from expertd.disk.page_cache import PageCache
from expertd.disk.record_file import RecordFile
from expertstore.errors import PackError

_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
ANNOUNCED_BYTES = 128 << 10
"""``MADV_WILLNEED`` begins to read this much at least, of a longer range maybe no more: the
kernel goes no further than read-ahead and the disk's largest request."""
_PAGE = mmap.PAGESIZE
_TABLE_BYTES = _PAGE // 8 * _PAGE  # what a page table maps


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("address", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int, ctypes.POINTER(_Range), ctypes.c_ulong,
    ctypes.POINTER(_Range), ctypes.c_ulong, ctypes.c_ulong,
)  # fmt: skip
_FAILED = ctypes.c_void_p(-1).value


class MappedFile(RecordFile):
    """A file of a pack, mapped for reading; ``page_cache`` bounds what its reads leave there.

    The mapping has room for ``num_bytes``, so that a file that was cut short can be mended in
    place. Raises :class:`PackError` if it cannot be opened or mapped.
    """

    def __init__(self, path: Path, *, page_cache: PageCache, num_bytes: int = 0) -> None:
        super().__init__(path, direct=False)
        self._page_cache = page_cache
        self._populates = self._copies = True
        self._num_bytes = max(num_bytes, os.fstat(self.fd).st_size, 1)
        address = map_file(self.fd, self._num_bytes)
        if address is None:
            reason = os.strerror(ctypes.get_errno())
            super().close()
            raise PackError(
                f'{path} cannot be mapped: {reason}; set disk_io to "direct" for this pack.'
            )
        self._address = address
        # The pages that are asked for, and no more: the bound counts those.
        advise(address, self._num_bytes, mmap.MADV_RANDOM)

    def read_some(self, targets: Sequence[memoryview], offset: int) -> int:
        """One read into ``targets``, as that of a :class:`RecordFile`."""
        if self.fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        wanted = offset + sum(map(len, targets))
        # In the last page of a file, what lies behind its end would be read as zeros.
        end = min(wanted, self._num_bytes, os.fstat(self.fd).st_size)
        if end <= offset:
            return 0
        self._begin(offset, end - offset)
        try:
            self._populate(offset, end)
            return self._copy(targets, offset, end)
        finally:
            self._let_go(offset, end)
            starts = accumulate(map(len, targets), initial=offset)
            self._page_cache.keep(self, list(zip(starts, map(len, targets), strict=False)))

    def announce(self, offset: int, num_bytes: int) -> None:
        """Has the kernel begin to read a range that will be read soon, if there is room."""
        if self.fd >= 0 and 2 * num_bytes <= self._page_cache.max_bytes:
            self._begin(offset, num_bytes)
            self._page_cache.keep(self, [(offset, num_bytes)])

    def forget(self, offset: int, num_bytes: int) -> None:
        """Has the page cache give up what it holds of a range, as far as nobody else maps it."""
        if self.fd >= 0:
            self._let_go(offset, offset + num_bytes)
            super().forget(offset, num_bytes)

    def close(self) -> None:
        """Unmaps and closes; what the page cache holds stays there. Twice is harmless."""
        if self.fd >= 0:
            self._page_cache.remove(self)
            _libc.munmap(self._address, self._num_bytes)
            super().close()

    def _pages(self, start: int, end: int) -> tuple[int, int]:
        """Address and length of the pages that hold a range."""
        first = start - start % _PAGE
        return self._address + first, -(-end // _PAGE) * _PAGE - first

    def _let_go(self, start: int, end: int) -> None:
        """Leaves pages to the page cache: this process's RAM is the arena.

        With a page, the kernel maps those around it that it has, as far as one page table goes.
        """
        address, num_bytes = self._pages(start, end)
        first = max(self._address, address - address % _TABLE_BYTES)
        last = -(-(address + num_bytes) // _TABLE_BYTES) * _TABLE_BYTES
        most = self._address + -(-self._num_bytes // _PAGE) * _PAGE
        advise(first, min(last, most) - first, mmap.MADV_DONTNEED)

    def _begin(self, offset: int, num_bytes: int) -> None:
        """Has the kernel begin to read a range, without waiting for it."""
        for start in range(offset, offset + num_bytes, ANNOUNCED_BYTES):
            length = min(ANNOUNCED_BYTES, offset + num_bytes - start)
            # Of no consequence if refused: it is read when it is populated.
            advise(*self._pages(start, start + length), mmap.MADV_WILLNEED)

    def _populate(self, offset: int, end: int) -> None:
        """Waits until the pages are there. Raises OSError if the disk cannot read one."""
        if not self._populates:
            return
        error = advise(*self._pages(offset, end), _MADV_POPULATE_READ)
        if error == errno.EINVAL:  # an older kernel: copying brings the pages in, one by one
            self._populates = False
        elif error:
            self._check(error, end)

    def _copy(self, targets: Sequence[memoryview], offset: int, end: int) -> int:
        if not self._copies:
            return os.preadv(self.fd, targets, offset)
        count = copy(self._address + offset, end - offset, targets)
        if count >= 0:
            return count
        error = ctypes.get_errno()
        if error in (errno.EPERM, errno.ENOSYS):  # a sandbox that allows it to nobody
            self._copies = False
            return os.preadv(self.fd, targets, offset)
        self._check(error, end)
        return 0

    def _check(self, error: int, end: int) -> None:
        """Raises OSError, unless the file has been cut short meanwhile."""
        if error == errno.EFAULT:
            if os.fstat(self.fd).st_size < end:
                return
            error = errno.EIO
        raise OSError(error, os.strerror(error))


def map_file(fd: int, num_bytes: int) -> int | None:
    """The address of a new mapping; None if it is refused, with the cause in ctypes' errno."""
    address: int = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    return None if address == _FAILED else address


def advise(address: int, num_bytes: int, advice: int) -> int:
    """``madvise``; its errno, 0 if it succeeded."""
    return ctypes.get_errno() if _libc.madvise(address, num_bytes, advice) else 0


def copy(address: int, num_bytes: int, targets: Sequence[memoryview]) -> int:
    """Has the kernel copy to ``targets``: how much, less than asked for where a page is missing.

    -1 if not even the first is there, with the cause in ctypes' errno.
    """
    places = (_Range * len(targets))()
    for place, target in zip(places, targets, strict=True):
        place.address = ctypes.addressof(ctypes.c_char.from_buffer(target))
        place.num_bytes = len(target)
    source = _Range(address, num_bytes)
    count: int = _libc.process_vm_readv(os.getpid(), places, len(places), source, 1, 0)
    return count

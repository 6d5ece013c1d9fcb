"""Anonymous shared memory that is handed to other processes as a descriptor."""

import fcntl
import mmap
import os
from contextlib import suppress

# fcntl has them from Python 3.8 on, but typeshed only for some platforms.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """A memfd of fixed size, mapped writable here. ``close`` twice is harmless.

    It is sealed against shrinking and growing: a reader of a shrunk mapping would die of
    SIGBUS. ``mode`` is that of its inode: with 0400 another uid can reopen it neither
    writable nor at all, while the owner can adopt it later.
    """

    def __init__(self, name: str, num_bytes: int, mode: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, num_bytes)
            os.fchmod(self.fd, mode)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map()
        except BaseException:
            os.close(self.fd)
            raise

    @classmethod
    def adopt(cls, fd: int) -> "SharedMemory":
        """That which another process made with this class, by its descriptor, ours from now on.

        Raises ValueError, and leaves the descriptor the caller's, if it is something else.
        """
        self = cls.__new__(cls)
        self.fd = fd
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ValueError("it is not sealed against a change of its size")
            self.num_bytes = os.fstat(fd).st_size
            self._map()
        except OSError as error:
            raise ValueError(f"it is no shared memory that we can map ({error})") from error
        return self

    def _map(self) -> None:
        self._mapping = mmap.mmap(self.fd, self.num_bytes)
        # A core dump would write all of it to disk before a successor could start.
        self._mapping.madvise(mmap.MADV_DONTDUMP)
        self.view = memoryview(self._mapping)

    def open_read_only(self) -> int:
        """A new descriptor that cannot be mapped writable; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Unmaps and closes; workers' own mappings stay valid."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.view.release()
        # A view may still be in use (a read in flight at shutdown): then the collector unmaps.
        with suppress(BufferError):
            self._mapping.close()

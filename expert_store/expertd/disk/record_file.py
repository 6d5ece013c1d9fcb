"""A file of a pack, read past the page cache."""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from expertstore.errors import PackError
from expertstore.pack.files import open_regular
from expertstore.pack.layout import PAGE_BYTES


class RecordFile:
    """A file of a pack, read past the page cache (O_DIRECT) where the file system can.

    The arena is the cache: keeping every record in the page cache too would double its RAM.
    :class:`~expertd.disk.mapped_file.MappedFile` is the other way. Raises :class:`PackError` if
    the file cannot be opened.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        self.path = path
        self.fd = -1
        self.direct = False
        try:
            if direct:
                self.direct = self._open_direct()
            if not self.direct:
                self.fd = open_regular(path)
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}.") from error

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills ``target`` from byte ``offset``. Raises OSError; EOFError if the file ends."""
        done = 0
        while done < len(target):
            count = self.read_some([target[done:]], offset + done)
            if not count:
                raise EOFError
            done += count
            if self.direct and done % PAGE_BYTES and done < len(target):
                raise EOFError  # only the end of a file is read in other than whole blocks

    def read_some(self, targets: Sequence[memoryview], offset: int) -> int:
        """One read into ``targets``, which may be short; 0 at the file's end. Raises OSError."""
        return os.preadv(self.fd, targets, offset)

    def announce(self, offset: int, num_bytes: int) -> None:
        """Says that a range will be read soon; of no use past the page cache."""

    def forget(self, offset: int, num_bytes: int) -> None:
        """Has the page cache give up what it holds of a range, as far as nobody maps it."""
        if self.fd >= 0:
            os.posix_fadvise(self.fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes the file; twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _open_direct(self) -> bool:
        try:
            self.fd = open_regular(self.path, os.O_DIRECT)
            # Some take the flag and then refuse to read so, or only in larger blocks than ours.
            with mmap.mmap(-1, PAGE_BYTES) as page:
                os.preadv(self.fd, [page], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:  # tmpfs and some network file systems
                self.close()
                return False
            if self.fd < 0:
                raise
            # A disk that cannot read this page may read others: each read tells its own error.
        return True

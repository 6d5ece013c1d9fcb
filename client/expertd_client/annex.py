"""Records that this process reads from the pack, because the arena has no slot for them.

They are copies in memory of its own, not the mapped file: what has been verified stays what it is,
whatever becomes of the file. In a mapping a file that is overwritten changes beneath its reader,
and one that is truncated is SIGBUS, long after the checksum was right. To read is one copy by the
kernel out of the page cache, which all workers of the host share.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from expertstore.pack.files import open_regular

_PROT_READ, _PROT_WRITE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class PackPlace(NamedTuple):
    """Where an expert's record lies in the pack, and its XXH3-64."""

    expert: int
    file: str
    offset: int
    checksum: int


class PackUnreadableError(Exception):
    """This process cannot read a record from the pack; the message says why."""


class Annex:
    """``num_bytes`` of this process's own memory, for records; none of it is used at first.

    It is a part of ``reserved``, an inaccessible mapping at ``address``, from byte ``start`` on.
    """

    def __init__(self, reserved: mmap.mmap, address: int, start: int, num_bytes: int) -> None:
        self._reserved, self._start = reserved, start
        self._address = address + start
        self.num_bytes = num_bytes
        self._memory: memoryview | None = None

    def part(self, start: int, num_bytes: int) -> memoryview:
        """That part of it, writable. Raises OSError if the system has no memory for it."""
        if self._memory is None:
            address, size = ctypes.c_void_p(self._address), ctypes.c_size_t(self.num_bytes)
            if _libc.mprotect(address, size, _PROT_READ | _PROT_WRITE):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error))
            memory = (ctypes.c_uint8 * self.num_bytes).from_address(self._address)
            self._memory = memoryview(memory).cast("B")
        return self._memory[start : start + num_bytes]

    def clear(self) -> None:
        """Gives its memory back to the system; it reads as zeros then."""
        if self._memory is not None:
            self._reserved.madvise(mmap.MADV_DONTNEED, self._start, self.num_bytes)


class PackFiles:
    """The files of the pack at ``directory``, opened when they are first read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close, self._files)

    def read(self, place: PackPlace, target: memoryview) -> None:
        """Fills ``target`` with the record, verified. Raises PackUnreadableError."""
        path = self._directory / place.file
        try:
            file = self._files.get(place.file)
            if file is None:
                file = self._files[place.file] = open_regular(path)
            done = 0
            while done < len(target):
                count = os.preadv(file, [target[done:]], place.offset + done)
                if not count:
                    raise PackUnreadableError(f"{path} is truncated")
                done += count
        except OSError as error:
            raise PackUnreadableError(f"{path}: {error.strerror}") from error
        if xxh3_64_intdigest(target) != place.checksum:
            raise PackUnreadableError(f"a record in {path} is not what the daemon's is")


def _close(files: Mapping[str, int]) -> None:
    for file in files.values():
        os.close(file)

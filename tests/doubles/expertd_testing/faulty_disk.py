"""A pack file that misbehaves as told: what a failing disk does, for tests and drills."""

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertd.disk.mapped_file import MappedFile
from expertd.disk.page_cache import PageCache
from expertd.disk.record_file import RecordFile


@dataclass
class Faults:
    """What goes wrong in reads from now on; may be changed while the file is read."""

    error: int | None = None
    """The errno of every read."""
    bad: set[int] = field(default_factory=set)
    """Offsets of bytes that give EIO, as a bad sector does."""
    end: int | None = None
    """Where the file seems to end."""
    most_bytes: int | None = None
    """No read returns more: short reads. Of a file read directly, give whole 4 KiB."""
    flipped: set[int] = field(default_factory=set)
    """Offsets of bytes that come with one bit wrong."""
    gate: threading.Event = field(default_factory=threading.Event)
    """While it is not set, reads hang."""

    def __post_init__(self) -> None:
        self.gate.set()


class FaultyFile(RecordFile):
    """A :class:`~expertd.disk.record_file.RecordFile` whose single reads suffer ``faults``."""

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        super().__init__(path, direct=direct)
        self._set_faults()

    def _set_faults(self) -> None:
        self.faults = Faults()
        self.offsets: list[int] = []
        """Where each read of a record began, in order, before it met its fault."""

    def read_some(self, targets: Sequence[memoryview], offset: int) -> int:
        """One read with its faults."""
        faults = self.faults
        self.offsets += [offset + sum(map(len, targets[:i])) for i in range(len(targets))]
        faults.gate.wait()
        if faults.error is not None:
            raise OSError(faults.error, os.strerror(faults.error))
        most = sum(map(len, targets))
        if any(offset <= position < offset + most for position in tuple(faults.bad)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if faults.end is not None:
            most = min(most, max(0, faults.end - offset))
        if faults.most_bytes is not None:
            most = min(most, faults.most_bytes)
        count, place = 0, offset
        for target in targets:
            part = target[: most - count]
            count += super().read_some([part], place) if len(part) else 0
            for position in tuple(faults.flipped):
                if place <= position < place + len(part):
                    target[position - place] ^= 1
            place += len(part)
        return count


class FaultyMappedFile(FaultyFile, MappedFile):
    """The same of a :class:`~expertd.disk.mapped_file.MappedFile`."""

    def __init__(
        self, path: Path, *, page_cache: PageCache | None = None, num_bytes: int = 0
    ) -> None:
        page_cache = page_cache or PageCache(1 << 30)
        MappedFile.__init__(self, path, page_cache=page_cache, num_bytes=num_bytes)
        self._set_faults()

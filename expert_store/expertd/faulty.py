"""A pack file that misbehaves as told: what a failing disk does, for tests and drills."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from expertd.loader import RecordFile


@dataclass
class Faults:
    """What goes wrong in reads from now on; may be changed while the file is read."""

    error: int | None = None
    """The errno of every read."""
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
    """A :class:`~expertd.loader.RecordFile` whose single reads suffer ``faults``."""

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        super().__init__(path, direct=direct)
        self.faults = Faults()
        self.offsets: list[int] = []
        """Where each read began, in order, before it met its fault."""

    def read_some(self, target: memoryview, offset: int) -> int:
        """One read with its faults."""
        faults = self.faults
        self.offsets.append(offset)
        faults.gate.wait()
        if faults.error is not None:
            raise OSError(faults.error, os.strerror(faults.error))
        if faults.end is not None:
            target = target[: max(0, faults.end - offset)]
        if faults.most_bytes is not None:
            target = target[: faults.most_bytes]
        count = super().read_some(target, offset) if len(target) else 0
        for position in faults.flipped.intersection(range(offset, offset + count)):
            target[position - offset] ^= 1
        return count

"""What each worker has done so far, in shared memory: it survives the worker's kill -9."""

import mmap
from dataclasses import astuple, dataclass, fields
from pathlib import Path

_WORD_BYTES = 8


@dataclass
class Row:
    """One worker's counts."""

    records_used: int = 0
    """Records whose release succeeded: the worker was entitled to each of their bytes."""
    bytes_used: int = 0
    records_wrong: int = 0
    """Of these, those that were not what the pack holds."""
    leases_lost: int = 0
    """Leases whose release said that the session was over: nothing of them was used."""
    attaches: int = 0
    hits: int = 0
    misses: int = 0
    reads: int = 0
    """Records read by RPC."""

    def __add__(self, other: "Row") -> "Row":
        return Row(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


_NUM_FIELDS = len(fields(Row))


class Board:
    """A row for each of ``num_rows`` workers, in the file ``path``."""

    def __init__(self, path: Path, num_rows: int) -> None:
        size = num_rows * _NUM_FIELDS * _WORD_BYTES
        with path.open("ab") as file:
            file.truncate(size)
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), size)).cast("Q")

    def write(self, index: int, row: Row) -> None:
        """Replaces a worker's row."""
        start = index * _NUM_FIELDS
        for offset, value in enumerate(astuple(row)):
            self._words[start + offset] = value

    def read(self, index: int) -> Row:
        """A worker's row."""
        start = index * _NUM_FIELDS
        return Row(*self._words[start : start + _NUM_FIELDS])

    def total(self, num_rows: int) -> Row:
        """The sum of the first rows."""
        return sum((self.read(index) for index in range(num_rows)), Row())

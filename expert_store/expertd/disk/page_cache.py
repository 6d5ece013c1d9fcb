"""What mapped reads have left in the page cache, kept within a bound."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol


class CachedFile(Protocol):
    """A file whose ranges can be dropped from the page cache."""

    def forget(self, offset: int, num_bytes: int) -> None:
        """Drops them."""


class PageCache:
    """Ranges of files that were read by way of the page cache, ``max_bytes`` of them at most.

    Of more, those read longest ago are dropped. The kernel may have dropped some before, so
    ``num_bytes`` is the most that they occupy. Threads may share it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._ranges: OrderedDict[tuple[CachedFile, int], int] = OrderedDict()
        self._bytes_of: dict[CachedFile, int] = {}
        # Held while ranges are dropped, too: a file must not be unmapped meanwhile.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"PageCache({self.num_bytes} of {self.max_bytes} bytes)"

    def bytes_of(self, files: Iterable[CachedFile]) -> int:
        """What ``files`` have of them."""
        return sum(self._bytes_of.get(file, 0) for file in files)

    def keep(self, file: CachedFile, ranges: Sequence[tuple[int, int]]) -> None:
        """Takes in what was just read: offsets and sizes. Drops what is then too much."""
        with self._lock:
            for offset, num_bytes in ranges:
                self._add(file, num_bytes - self._ranges.pop((file, offset), 0))
                self._ranges[file, offset] = num_bytes
            while self.num_bytes > self.max_bytes:
                (old, start), length = self._ranges.popitem(last=False)
                # What was read together is dropped together.
                while (
                    self.num_bytes - length > self.max_bytes
                    and (more := self._ranges.pop((old, start + length), None)) is not None
                ):
                    length += more
                self._add(old, -length)
                old.forget(start, length)

    def remove(self, file: CachedFile, *, drop: bool = False) -> None:
        """Counts a file no more, which may then be closed; ``drop``: its ranges are dropped."""
        with self._lock:
            for of, offset in [key for key in self._ranges if key[0] is file]:
                length = self._ranges.pop((of, offset))
                if drop:
                    file.forget(offset, length)
            self.num_bytes -= self._bytes_of.pop(file, 0)

    def _add(self, file: CachedFile, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._bytes_of[file] = self._bytes_of.get(file, 0) + num_bytes

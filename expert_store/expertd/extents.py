"""Who owns which bytes of the arena: a first-fit allocator over 4 KiB pages.

Records of one model have one size, so first fit refills the holes that eviction leaves;
neighbouring free extents join, so records of other sizes find room again.
"""

from bisect import bisect_left, bisect_right, insort
from typing import NamedTuple

PAGE_BYTES = 4096


class Extent(NamedTuple):
    """A run of arena bytes; both numbers are multiples of 4 KiB."""

    offset: int
    num_bytes: int


class Extents:
    """The free extents of an arena of ``num_bytes``, in order of their offsets."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes_total = num_bytes - num_bytes % PAGE_BYTES
        self._free = [Extent(0, self.bytes_total)] if self.bytes_total else []
        self.bytes_free = self.bytes_total

    def __repr__(self) -> str:
        return f"Extents({self.bytes_free} of {self.bytes_total} free in {len(self._free)})"

    @property
    def bytes_used(self) -> int:
        """What is allocated."""
        return self.bytes_total - self.bytes_free

    def allocate(self, num_bytes: int) -> Extent | None:
        """The first free extent of that size, or None if no hole is large enough."""
        if num_bytes <= 0 or num_bytes % PAGE_BYTES:
            raise ValueError(f"{num_bytes} is not a positive multiple of {PAGE_BYTES}")
        for index, hole in enumerate(self._free):
            if hole.num_bytes < num_bytes:
                continue
            if hole.num_bytes == num_bytes:
                del self._free[index]
            else:
                self._free[index] = Extent(hole.offset + num_bytes, hole.num_bytes - num_bytes)
            self.bytes_free -= num_bytes
            return Extent(hole.offset, num_bytes)
        return None

    def take(self, extent: Extent) -> None:
        """Allocates exactly ``extent``. Raises ValueError unless all of it is free."""
        start, end = extent.offset, extent.offset + extent.num_bytes
        if start % PAGE_BYTES or extent.num_bytes <= 0 or extent.num_bytes % PAGE_BYTES:
            raise ValueError(f"{extent} is not made of whole pages")
        index = bisect_right(self._free, start, key=lambda hole: hole.offset) - 1
        if index < 0 or sum(self._free[index]) < end:
            raise ValueError(f"{extent} is not free")
        hole = self._free[index]
        rest = (Extent(hole.offset, start - hole.offset), Extent(end, sum(hole) - end))
        self._free[index : index + 1] = [part for part in rest if part.num_bytes]
        self.bytes_free -= extent.num_bytes

    def free(self, extent: Extent) -> None:
        """Gives an allocated extent back and joins it with its free neighbours."""
        start, end = extent.offset, extent.offset + extent.num_bytes
        index = bisect_left(self._free, extent)
        if index < len(self._free) and self._free[index].offset < end:
            raise ValueError(f"{extent} is free already")
        if index and sum(self._free[index - 1]) > start:
            raise ValueError(f"{extent} is free already")
        if index < len(self._free) and self._free[index].offset == end:
            end += self._free.pop(index).num_bytes
        if index and sum(self._free[index - 1]) == start:
            start = self._free.pop(index - 1).offset
        insort(self._free, Extent(start, end - start))
        self.bytes_free += extent.num_bytes

"""Who owns which bytes of the arena: a first-fit allocator over 4 KiB pages.

Records of one model have one size, so first fit refills the holes that eviction leaves;
neighbouring free extents join, so records of other sizes find room again.
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
    def holes(self) -> tuple[Extent, ...]:
        """The free extents, in order of their offsets."""
        return tuple(self._free)

    @property
    def bytes_used(self) -> int:
        """What is allocated."""
        return self.bytes_total - self.bytes_free

    def allocate(self, num_bytes: int) -> Extent | None:
        """The first free extent of that size, or None if no hole is large enough."""
        extents = self.allocate_all([num_bytes])
        return extents[0] if extents else None

    def allocate_all(self, sizes: Sequence[int]) -> list[Extent] | None:
        """Extents of those sizes, in their order; None, and nothing taken, if not all fit."""
        if any(size <= 0 or size % PAGE_BYTES for size in sizes):
            raise ValueError(f"{sizes} are not all positive multiples of {PAGE_BYTES}")
        holes = np.array([hole.num_bytes for hole in self._free], np.int64)
        placed = first_fit(holes, sizes)
        if placed is None:
            return None
        taken: dict[int, list[Extent]] = {}
        starts: dict[int, int] = {}
        for size, counts in placed:
            extents = taken[size] = []
            for index in np.flatnonzero(counts).tolist():
                start = starts.get(index, self._free[index].offset)
                end = starts[index] = start + size * int(counts[index])
                extents += [Extent(offset, size) for offset in range(start, end, size)]
            extents.reverse()
        for index in sorted(starts, reverse=True):
            hole, start = self._free[index], starts[index]
            rest = Extent(start, sum(hole) - start)
            self._free[index : index + 1] = [rest] if rest.num_bytes else []
        self.bytes_free -= sum(sizes)
        return [taken[size].pop() for size in sizes]

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


def first_fit(
    holes: npt.NDArray[np.int64], sizes: Sequence[int]
) -> list[tuple[int, npt.NDArray[np.int64]]] | None:
    """How many extents of each size to put into each hole; None if they do not all fit.

    The largest first, each into the first hole with room. In one hole whatever fits by size
    fits; in several this is a heuristic, as packing bins is NP-hard.
    """
    left = holes.copy()
    placed = []
    for size, count in sorted(Counter(sizes).items(), reverse=True):
        fits = left // size
        before = np.cumsum(fits) - fits
        counts = np.clip(count - before, 0, fits)
        if counts.sum() < count:
            return None
        left -= counts * size
        placed.append((size, counts))
    return placed

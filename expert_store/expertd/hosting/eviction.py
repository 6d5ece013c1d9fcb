"""Which records to evict so that others fit: a pure decision over plain arrays.

Evicting the coldest records makes room, but room in one piece only if all records are of one
size. So the question asked here is: how many of the coldest must be *considered*, so that
among the holes that they would leave, with what is free already, those wanted fit? With
records of one size that is the coldest few; where a larger one is wanted, more, until some
of them are neighbours. Of those considered, only what lies where the new ones would go is
evicted.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expertd.memory.extents import Extent, first_fit

Numbers = npt.NDArray[np.int64]


def choose_victims(
    sizes: Sequence[int], loose: Sequence[Extent], offsets: Numbers, lengths: Numbers
) -> Numbers | None:
    """Which candidates to evict so that extents of ``sizes`` can be allocated; None if none do.

    ``offsets`` and ``lengths`` (bytes) are those of the candidates, coldest first; the
    result has indices into them. ``loose`` is what is free or will be without our doing.
    """
    free_offsets = np.array([extent.offset for extent in loose], np.int64)
    free_lengths = np.array([extent.num_bytes for extent in loose], np.int64)

    def consider(count: int) -> Numbers | None:
        where = np.concatenate([free_offsets, offsets[:count]])
        length = np.concatenate([free_lengths, lengths[:count]])
        used = _used(sizes, where, length)
        if used is None:
            return None
        victims: Numbers = np.flatnonzero(used[len(loose) :])
        return victims

    shortage = sum(sizes) - int(free_lengths.sum())
    count = 0
    if shortage > 0:
        count = int(np.searchsorted(np.cumsum(lengths), shortage)) + 1
    too_few = count - 1
    while (victims := consider(min(count, len(offsets)))) is None:
        if count >= len(offsets):
            return None
        too_few, count = count, max(2 * count, 8)
    count = min(count, len(offsets))
    while count - too_few > 1:
        middle = (count + too_few) // 2
        fewer = consider(middle)
        if fewer is None:
            too_few = middle
        else:
            count, victims = middle, fewer
    return victims


def _used(sizes: Sequence[int], offsets: Numbers, lengths: Numbers) -> npt.NDArray[np.bool_] | None:
    """Which of these pieces extents of ``sizes`` would lie in, were all free; None: no room.

    They would lie where :meth:`~expertd.memory.extents.Extents.allocate_all` puts them.
    """
    if not len(offsets):
        return None
    order = np.argsort(offsets)
    start, length = offsets[order], lengths[order]
    opens = np.concatenate([[True], start[1:] != start[:-1] + length[:-1]])
    heads = np.flatnonzero(opens)
    placed = first_fit(np.add.reduceat(length, heads), sizes)
    if placed is None:
        return None
    ends = start[heads] + sum(size * counts for size, counts in placed)
    used = np.zeros(len(offsets), np.bool_)
    used[order] = start < ends[np.cumsum(opens) - 1]
    return used

"""Where to move records so that the room between them joins: a pure decision.

The last resort, when nothing is left to evict or to wait for: what lies in the arena then is
kept, by pins or by whoever asks, and the rest would fit by size but not in one piece. A
record is copied to a place that does not overlap its old one, since workers may read the old
until they have published an epoch; so it needs a hole of its own size.

Records are packed towards the arena's start. What stands behind the first gap moves down into
it, if it is no larger than the gap; else another record fills the gap that is not; else the one
behind it first makes way, to the end of a hole that is large enough for any record (*the
window*), which makes the gap larger by its size: then at least it can come back, lower. Each move
but the last kind lengthens the packed part and none of that kind follows another, so packing
ends. It needs a window to begin with, which :mod:`expertd.hosting.slots` leaves when it
pins; and it keeps one: only who makes way uses it up, and whoever fills a gap while there is none
must be one whose going opens one. Who has made way is.
"""

from collections.abc import Sequence
from typing import NamedTuple

from expertd.memory.extents import Extent


class Move(NamedTuple):
    """The record of that number, and where it goes."""

    number: int
    target: Extent


def next_move(kept: Sequence[Extent], num_bytes: int) -> Move | None:
    """What to move first so that all of ``kept``, in order of offsets, gets packed.

    ``num_bytes`` is the arena's size. None if all are packed, or if there is no window.
    """
    cursor = first = 0
    while first < len(kept) and kept[first].offset == cursor:
        cursor += kept[first].num_bytes
        first += 1
    if first == len(kept):
        return None
    gap = kept[first].offset - cursor
    if kept[first].num_bytes <= gap:
        return Move(first, Extent(cursor, kept[first].num_bytes))
    # holes[i] lies before kept[first + i], the last at the arena's end.
    starts = [cursor, *map(sum, kept[first:])]
    ends = [*(extent.offset for extent in kept[first:]), num_bytes]
    holes = [end - start for start, end in zip(starts, ends, strict=True)]
    largest = max(extent.num_bytes for extent in kept)
    has_window = max(holes) >= largest
    for index in range(len(holes) - 2, 0, -1):
        size = kept[first + index].num_bytes
        opens = holes[index] + size + holes[index + 1] >= largest
        if size <= gap and (has_window or opens):
            return Move(first + index, Extent(cursor, size))
    if not has_window:
        return None
    size = kept[first].num_bytes
    window = max(index for index, hole in enumerate(holes) if hole >= largest)
    return Move(first, Extent(ends[window] - size, size))

"""Where to move records so that the room between them joins: a pure decision.

The last resort, when nothing is left to evict or to wait for: what lies in the arena then is
kept, by pins or by whoever asks, and the rest would fit by size but not in one piece. A
record is copied to a place that does not overlap its old one, since workers may read the old
until they have published an epoch; so it needs a hole of its own size.

Records are packed towards the arena's start. Is the first gap large enough for any record
behind it, that moves in. If not, the record behind the gap first makes way to a hole further
up, which makes the gap larger by its size: then at least it can come back, lower. So every
other move lengthens the packed part, and packing ends. It needs one hole of the largest
kept record's size, anywhere: :meth:`expertd.slots.Slots.reserve` leaves one when it pins.
"""

from collections.abc import Sequence
from typing import NamedTuple

from expertd.extents import Extent


class Move(NamedTuple):
    """The record of that number, and where it goes."""

    number: int
    target: Extent


def next_move(kept: Sequence[Extent], num_bytes: int) -> Move | None:
    """What to move first so that all of ``kept``, in order of offsets, gets packed.

    ``num_bytes`` is the arena's size. None if all are packed, or if no hole is large enough
    to begin with.
    """
    cursor = 0
    first = 0
    while first < len(kept) and kept[first].offset == cursor:
        cursor += kept[first].num_bytes
        first += 1
    if first == len(kept):
        return None
    gap = kept[first].offset - cursor
    for number in range(len(kept) - 1, first - 1, -1):
        if kept[number].num_bytes <= gap:
            return Move(number, Extent(cursor, kept[number].num_bytes))
    size, end = kept[first].num_bytes, num_bytes
    for number in range(len(kept) - 1, first - 1, -1):
        if end - sum(kept[number]) >= size:
            return Move(first, Extent(end - size, size))
        end = kept[number].offset
    return None

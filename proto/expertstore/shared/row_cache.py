"""Where rows of a table lie in the arena: the daemon writes them, workers copy them out.

A region of the arena is a cache of so many *sets* of :data:`WAYS` slots: row ``i`` can only be in
set ``i % num_sets``. Two arrays, one behind the other::

    tags  [num_sets, WAYS]             64-bit words: which row a slot has
    rows  [num_sets, WAYS, row_bytes]  the rows, as the pack has them

A tag is ``generation << 40 | row + 1``; 0 is an empty slot. The daemon empties the tag, writes the
row, then writes the tag with a new generation. A reader looks the tag up, copies the row, and looks
again: what it copied is the row if the tag is the same. So nothing is leased, and a reader that
stands still holds nobody up. Stores and loads stay in order on x86-64; elsewhere each step here is
a call into numpy by either side's interpreter, whose lock is a fence between them.

Why rows, and not the file's pages: the rows that a text needs lie far apart, so that a page of
4 KiB would be kept for one row of 90 or 320 bytes.
"""

from dataclasses import dataclass

from expertstore.pack.layout import PAGE_BYTES, round_up

WAYS = 16
TAG_BYTES = 8
ROW_BITS = 40
MAX_ROWS = (1 << ROW_BITS) - 1
EMPTY = 0


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """The cache of one table: ``num_sets`` sets for rows of ``row_bytes``, at ``offset``."""

    offset: int
    num_sets: int
    row_bytes: int

    @property
    def num_slots(self) -> int:
        """Rows that it can have."""
        return self.num_sets * WAYS

    @property
    def tags_bytes(self) -> int:
        """Size of the tags, in whole pages."""
        return round_up(self.num_slots * TAG_BYTES, PAGE_BYTES)

    @property
    def rows_offset(self) -> int:
        """Where the rows begin."""
        return self.offset + self.tags_bytes

    @property
    def num_bytes(self) -> int:
        """All of it, in whole pages."""
        return self.tags_bytes + round_up(self.num_slots * self.row_bytes, PAGE_BYTES)


def sets_for(num_rows: int) -> int:
    """How many sets hold so many rows, whichever these are of a table that has no more."""
    return -(-num_rows // WAYS)


def sets_in(num_bytes: int, row_bytes: int) -> int:
    """How many sets ``num_bytes`` of the arena have room for."""
    # Each of the two arrays ends on a page.
    return max(0, num_bytes - 2 * PAGE_BYTES) // (WAYS * (row_bytes + TAG_BYTES))

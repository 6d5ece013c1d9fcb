"""The rows of one table that are in RAM: sets of slots, the longest unused of a set goes first."""

import numpy as np
import numpy.typing as npt

from expertstore.shared.row_cache import EMPTY, MAX_ROWS, ROW_BITS, WAYS, RowPlaces

Rows = npt.NDArray[np.int64]
"""Row numbers [n]."""
RowBytes = npt.NDArray[np.uint8]
"""Rows as they are stored [n, row_bytes]."""

_GENERATIONS = 1 << (64 - ROW_BITS)


class RowSlots:
    """The daemon's side of a cache (:mod:`expertstore.shared.row_cache`), on one thread.

    ``arena`` is all of it, writable; what is at ``places`` becomes an empty cache.
    """

    def __init__(self, arena: memoryview, places: RowPlaces) -> None:
        self.places = places
        part = arena[places.offset : places.offset + places.num_bytes]
        tags, rows = part[: places.tags_bytes], part[places.tags_bytes :]
        self._tags = np.frombuffer(tags, np.uint64)[: places.num_slots].reshape(-1, WAYS)
        end = places.num_slots * places.row_bytes
        self._rows = np.frombuffer(rows[:end], np.uint8).reshape(-1, WAYS, places.row_bytes)
        self._tags[:] = EMPTY
        self._used = np.zeros(self._tags.shape, np.int64)
        self._clock = self._generation = 0
        self.num_evicted = 0

    def __repr__(self) -> str:
        return f"RowSlots({self.num_resident} of {self.places.num_slots} rows)"

    @property
    def num_resident(self) -> int:
        """Rows that are here."""
        return int(np.count_nonzero(self._tags))

    def forget(self) -> None:
        """Lets go of the arena's memory: nothing may be asked any more."""
        self._tags = np.zeros((1, WAYS), np.uint64)
        self._rows = np.zeros((1, WAYS, 0), np.uint8)

    def missing(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """For each row, whether it is not here."""
        return ~self._place(rows)[0]

    def copy(self, rows: Rows) -> RowBytes:
        """Rows that are here. Raises ValueError if one is not."""
        here, ways = self._place(rows)
        if not here.all():
            raise ValueError("a row is not resident")
        data: RowBytes = self._rows[rows % self.places.num_sets, ways]
        return data

    def touch(self, rows: Rows) -> int:
        """Rows were used just now, in this order; how many of them are here."""
        here, ways = self._place(rows)
        clocks = self._clock + 1 + np.arange(len(rows))
        sets = rows % self.places.num_sets
        self._used[sets[here], ways[here]] = clocks[here]
        self._clock += len(rows)
        return int(here.sum())

    def put(self, rows: Rows, data: RowBytes) -> None:
        """Takes in distinct rows, in place of the longest unused of their sets."""
        new = np.flatnonzero(self.missing(rows))
        while len(new):
            # One of each set at a time: the next one of that set must see it.
            sets, first = np.unique(rows[new] % self.places.num_sets, return_index=True)
            self._replace(sets, rows[new[first]], data[new[first]])
            new = np.delete(new, first)

    def _replace(self, sets: Rows, rows: Rows, data: RowBytes) -> None:
        age = np.where(self._tags[sets] == EMPTY, -1, self._used[sets])
        ways = age.argmin(axis=1)
        self.num_evicted += int((self._tags[sets, ways] != EMPTY).sum())
        self._generation = (self._generation + 1) % _GENERATIONS
        # In this order: a reader that copies meanwhile finds another tag afterwards.
        self._tags[sets, ways] = EMPTY
        self._rows[sets, ways] = data
        self._tags[sets, ways] = (np.uint64(self._generation << ROW_BITS)) | (rows + 1).astype(
            np.uint64
        )
        self._clock += 1
        self._used[sets, ways] = self._clock

    def _place(self, rows: Rows) -> tuple[npt.NDArray[np.bool_], Rows]:
        """For each row, whether it is here, and in which slot of its set."""
        tags = self._tags[rows % self.places.num_sets] & np.uint64(MAX_ROWS)
        found = tags == (rows + 1).astype(np.uint64)[:, None]
        ways = found.argmax(axis=1)
        return found[np.arange(len(rows)), ways], ways

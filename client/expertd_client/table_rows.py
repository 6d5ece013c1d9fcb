"""Rows of a table: copied out of the arena where they are in it, else fetched."""

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from expertd_client.model import TableInfo
from expertd_client.session import Session
from expertstore.errors import NotFoundError
from expertstore.shared.row_cache import MAX_ROWS, WAYS

Rows = npt.NDArray[np.int64]
"""Row numbers [n]."""
RowBytes = npt.NDArray[np.uint8]
"""Rows as they are stored [n, row_bytes]."""

_TELL_SECONDS = 1.0
"""So often the daemon is told what was found in the arena, if nothing was missed."""


class TableRows:
    """One table of a session's model, for one thread; only :meth:`expect` is for any.

    It survives the session's reattaching. Where the session has copies of records, rows are
    fetched every time.
    """

    def __init__(self, session: Session, name: str) -> None:
        """Raises NotFoundError if the model has no such table."""
        self._session = session
        names = [table.name for table in session.model.tables]
        if name not in names:
            raise NotFoundError(f"{session.model.name} has no table {name}; pack it again.")
        self._number = names.index(name)
        self._used: list[Rows] = []
        self._num_used, self._told_at = 0, time.monotonic()
        self.hits = self.misses = 0

    def __repr__(self) -> str:
        return f"<TableRows {self.info.name} {self.hits} hits {self.misses} misses>"

    @property
    def info(self) -> TableInfo:
        """What the daemon says of it."""
        return self._session.model.tables[self._number]

    def read(self, rows: Rows) -> RowBytes:
        """``[n, row_bytes]``, in order; each distinct row is read once.

        Raises NotFoundError, RecordLostError, and as ``Session.acquire`` where the session is
        over.
        """
        distinct, order = np.unique(rows, return_inverse=True)
        out = np.empty((len(distinct), self.info.row_bytes), np.uint8)
        found = self._copy(distinct, out)
        self._note(distinct[found])
        missing = np.flatnonzero(~found)
        self.hits += len(distinct) - len(missing)
        self.misses += len(missing)
        for part in _parts(missing, self.info.max_rows):
            data = self._session.fetch_rows(
                self._number, distinct[part].tobytes(), self._take_used()
            )
            out[part] = np.frombuffer(data, np.uint8).reshape(len(part), -1)
        if self._num_used and time.monotonic() > self._told_at + _TELL_SECONDS:
            self._session.prefetch_rows(self._number, b"", self._take_used())
        return out[order]

    def expect(self, rows: Rows) -> None:
        """Hints that these rows are read soon, and waits for nothing."""
        distinct = np.unique(rows)
        view = self._session.arena_view
        if not view:
            return  # nothing of what is read ahead would reach this process
        for part in _parts(distinct, self.info.max_rows):
            absent = part[~self._look_up(view, part)[0]]
            if len(absent):
                self._session.prefetch_rows(self._number, absent.tobytes())

    def tell(self) -> None:
        """Tells the daemon what was found in the arena: before the session ends."""
        if self._num_used:
            self._session.tell_used(self._number, self._take_used())

    def _copy(self, rows: Rows, out: RowBytes) -> npt.NDArray[np.bool_]:
        """Copies into ``out`` those that are in the arena; which these are."""
        view = self._session.arena_view
        if view is None:
            return np.zeros(len(rows), np.bool_)
        if not view:
            self._session.check_revoked()  # says why
        found, ways, tags = self._look_up(view, rows)
        places = self.info.places
        begin, end = places.rows_offset, places.num_slots * places.row_bytes
        slots = np.frombuffer(view[begin : begin + end], np.uint8)
        cache = slots.reshape(-1, WAYS, places.row_bytes)
        out[found] = cache[(rows % places.num_sets)[found], ways[found]]
        # The row is what was copied if its slot has the tag that it had (row_cache.py).
        found &= self._look_up(view, rows)[2] == tags
        self._session.check_revoked()
        return found

    def _look_up(
        self, view: memoryview, rows: Rows
    ) -> tuple[npt.NDArray[np.bool_], Rows, npt.NDArray[np.uint64]]:
        """For each row whether it is in the arena, in which slot of its set, and that one's tag."""
        places = self.info.places
        end = places.offset + places.tags_bytes
        tags = np.frombuffer(view[places.offset : end], np.uint64)[: places.num_slots]
        own = tags.reshape(-1, WAYS)[rows % places.num_sets]
        here = (own & np.uint64(MAX_ROWS)) == (rows + 1).astype(np.uint64)[:, None]
        ways = here.argmax(axis=1)
        each = np.arange(len(rows))
        return here[each, ways], ways, own[each, ways]

    def _note(self, rows: Rows) -> None:
        if self._num_used + len(rows) <= self.info.max_rows:  # of more the first tell as much
            self._used.append(rows)
            self._num_used += len(rows)

    def _take_used(self) -> bytes:
        used = np.concatenate(self._used) if self._used else np.empty(0, np.int64)
        self._used, self._num_used, self._told_at = [], 0, time.monotonic()
        return used.tobytes()


def _parts(numbers: Rows, length: int) -> Iterator[Rows]:
    for start in range(0, len(numbers), length):
        yield numbers[start : start + length]

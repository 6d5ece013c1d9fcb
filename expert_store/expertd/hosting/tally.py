"""Records that are counted once however many keep them, and their bytes: no recounting."""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")


class Tally(Generic[KeyT]):
    """How many times each of some records is kept; ``num_bytes`` counts each record once.

    ``size`` tells a record's bytes. All calls cost what is added, removed or asked for, not what
    is kept already.
    """

    def __init__(self, size: Callable[[KeyT], int]) -> None:
        self._size = size
        self._counts: dict[KeyT, int] = {}
        self.num_bytes = 0

    def __repr__(self) -> str:
        return f"Tally({len(self._counts)} records, {self.num_bytes} bytes)"

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, record: KeyT) -> bool:
        return record in self._counts

    def __iter__(self) -> Iterator[KeyT]:
        return iter(self._counts)

    def count(self, record: KeyT) -> int:
        """How many times that record is kept."""
        return self._counts.get(record, 0)

    def add(self, records: Iterable[KeyT]) -> None:
        """Keeps each of ``records`` once more."""
        counts = self._counts
        for record in records:
            count = counts.get(record)
            if count is None:
                counts[record] = 1
                self.num_bytes += self._size(record)
            else:
                counts[record] = count + 1

    def remove(self, records: Iterable[KeyT]) -> None:
        """Takes back one :meth:`add` of each."""
        counts = self._counts
        for record in records:
            count = counts[record]
            if count == 1:
                del counts[record]
                self.num_bytes -= self._size(record)
            else:
                counts[record] = count - 1

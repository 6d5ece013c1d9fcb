"""The session page: what one worker tells the daemon without a call.

One small memfd per session, written by the worker (and, for ``revoked``, by the
daemon); little-endian.

=========  =======================================================================
word       meaning
=========  =======================================================================
0          magic
1          format version
2          epoch that the worker has published: it holds nothing older
3          released_fetch: leases of fetches up to this number are over
4          num_touches: accesses to experts since attach; the ring's write position
5          num_misses: how many of them had to be fetched
6          revoked: set by the daemon when it cuts the session off
7          ring_entries: capacity of the ring
8-511      reserved, 0
512...     ring of 32-bit touches: the expert's directory entry, and bit 31 if it
           had to be fetched
=========  =======================================================================

The daemon believes nothing here that could hurt anyone but the writer: an epoch or a
release that lies exposes only the liar's own reads, and touches are range-checked.
"""

from array import array
from collections.abc import Sequence

MAGIC = int.from_bytes(b"EXPSES\x00\x01", "little")
FORMAT_VERSION = 1
PAGE_BYTES = 4096
RING_ENTRIES = 16384
MISSED = 1 << 31

_EPOCH, _RELEASED, _TOUCHES, _MISSES, _REVOKED, _RING_ENTRIES = 2, 3, 4, 5, 6, 7


def session_page_bytes(ring_entries: int = RING_ENTRIES) -> int:
    """Size of the memfd: the header and the ring."""
    return PAGE_BYTES + ring_entries * 4


class SessionPage:
    """Either side's view of a session page; ``buffer`` is its writable mapping."""

    def __init__(self, buffer: memoryview) -> None:
        raw = buffer.cast("B")
        self._words = raw[:PAGE_BYTES].cast("Q")
        if self._words[0] != MAGIC or self._words[1] != FORMAT_VERSION:
            raise ValueError("not a session page of this format")
        self.ring_entries: int = self._words[_RING_ENTRIES]
        self.ring = raw[PAGE_BYTES : PAGE_BYTES + self.ring_entries * 4].cast("I")

    @classmethod
    def format(cls, buffer: memoryview, epoch: int) -> "SessionPage":
        """Writes an empty page, quiescent at ``epoch``, into a zeroed buffer."""
        words = buffer.cast("B")[:PAGE_BYTES].cast("Q")
        words[1] = FORMAT_VERSION
        words[_EPOCH] = epoch
        words[_RING_ENTRIES] = (len(buffer.cast("B")) - PAGE_BYTES) // 4
        words[0] = MAGIC
        return cls(buffer)

    @property
    def epoch(self) -> int:
        """The epoch that the worker has published."""
        value: int = self._words[_EPOCH]
        return value

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._words[_EPOCH] = value

    @property
    def released_fetch(self) -> int:
        """Leases of fetches up to this number are over."""
        value: int = self._words[_RELEASED]
        return value

    @released_fetch.setter
    def released_fetch(self, value: int) -> None:
        self._words[_RELEASED] = value

    @property
    def num_touches(self) -> int:
        """Accesses to experts since attach."""
        value: int = self._words[_TOUCHES]
        return value

    @property
    def num_misses(self) -> int:
        """How many accesses had to be fetched first."""
        value: int = self._words[_MISSES]
        return value

    @property
    def revoked(self) -> bool:
        """Whether the daemon has cut this session off."""
        return bool(self._words[_REVOKED])

    def revoke(self) -> None:
        """Daemon: cuts the session off, before any byte that it may read is reused."""
        self._words[_REVOKED] = 1

    def touch(
        self, entries: Sequence[int], missed: set[int] | frozenset[int] = frozenset()
    ) -> None:
        """Worker: records accesses, those in ``missed`` as not having been resident."""
        words = self._words
        position: int = words[_TOUCHES]
        num_missed = 0
        if missed:
            num_missed = sum(entry in missed for entry in entries)
            entries = [entry | MISSED if entry in missed else entry for entry in entries]
        start = position % self.ring_entries
        end = start + len(entries)
        if end <= self.ring_entries:
            # On the hit path: one copy takes a third less time than a store per entry.
            self.ring[start:end] = array("I", entries)
        else:
            for index, entry in enumerate(entries, start):
                self.ring[index % self.ring_entries] = entry
        # After the ring, so that the daemon never reads a slot that is yet to be written;
        # the misses last, so that whoever loads them first never sees more than touches.
        words[_TOUCHES] = position + len(entries)
        if num_missed:
            words[_MISSES] += num_missed

"""The directory: a shared table that says where each expert's record lies.

One memfd per model, of little-endian 64-bit words; workers map it read-only.

======  ==========================================================================
word    meaning
======  ==========================================================================
0       magic
1       format version
2       epoch: advanced by the daemon after it has withdrawn records
3       number of entries
4-511   reserved, 0
512...  one entry per expert, layer after layer in the pack's order
...     from the next page on, for a daemon that takes it over: what it is of
        (:mod:`expertd.memory.description`)
======  ==========================================================================

An entry is 0 while the record is absent; else its low 32 bits are 1 + the record's
4 KiB page in the arena and its high 32 bits the generation, which grows with each
publication, so that two residencies of one expert never look alike.

Reading or writing a ``memoryview`` of format ``Q`` at an index is one 8-byte copy of
an aligned address, which the compilers of CPython turn into one load or store: never
torn, no lock. ``docs/protocol.md`` has the order in which reader and daemon use them.
"""

from typing import NamedTuple

MAGIC = int.from_bytes(b"EXPDIR\x00\x01", "little")
FORMAT_VERSION = 1
PAGE_BYTES = 4096
HEADER_WORDS = PAGE_BYTES // 8
EPOCH_WORD = 2

ABSENT = 0


class Location(NamedTuple):
    """Where a resident record lies: byte offset in the arena, and its generation."""

    offset: int
    generation: int


def pack_word(offset: int, generation: int) -> int:
    """The entry of a record at byte ``offset`` (a multiple of 4 KiB) of the arena."""
    return (generation & 0xFFFF_FFFF) << 32 | (offset // PAGE_BYTES + 1)


def unpack_word(word: int) -> Location | None:
    """Where ``word`` says the record lies, or None if it is absent."""
    if word == ABSENT:
        return None
    return Location(((word & 0xFFFF_FFFF) - 1) * PAGE_BYTES, word >> 32)


def directory_bytes(num_entries: int) -> int:
    """Size of the directory of a model with ``num_entries`` experts."""
    size = (HEADER_WORDS + num_entries) * 8
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class DirectoryView:
    """The directory as a worker sees it. ``words`` is its mapping, of format ``Q``."""

    def __init__(self, words: memoryview) -> None:
        if words[0] != MAGIC or words[1] != FORMAT_VERSION:
            raise ValueError("not a directory of this format")
        self._words = words
        self.num_entries: int = words[3]

    @property
    def epoch(self) -> int:
        """The model's current epoch."""
        epoch: int = self._words[EPOCH_WORD]
        return epoch

    def word(self, entry: int) -> int:
        """The entry's word; ``ABSENT`` if the record is not resident."""
        word: int = self._words[HEADER_WORDS + entry]
        return word


class Directory(DirectoryView):
    """The directory as the daemon writes it."""

    @classmethod
    def format(cls, words: memoryview, num_entries: int) -> "Directory":
        """Writes an empty directory of ``num_entries`` into zeroed ``words``."""
        words[1] = FORMAT_VERSION
        words[EPOCH_WORD] = 1
        words[3] = num_entries
        words[0] = MAGIC
        return cls(words)

    def publish(self, entry: int, word: int) -> None:
        """Makes a record visible; its bytes must be complete and verified."""
        self._words[HEADER_WORDS + entry] = word

    def withdraw(self, entry: int) -> None:
        """Makes a record absent; its bytes stay until the epoch rule frees them."""
        self._words[HEADER_WORDS + entry] = ABSENT

    def advance_epoch(self) -> int:
        """Ends the current epoch, after withdrawals; returns the new one."""
        epoch = self.epoch + 1
        self._words[EPOCH_WORD] = epoch
        return epoch

"""The arena's last page: which arena it is, and whose sessions may still believe what they read.

It lies behind the records, so whoever can read a record can read it. Little-endian 64-bit words:

=====  ==========================================================================
word   meaning
=====  ==========================================================================
0      magic
1      format version
2      id of the arena, random: a directory names the arena that its words are for
3      adoptions: how many daemons have taken this arena over from the one before
4      reused_by: the adoption whose daemon was the last to begin to reuse bytes
5-511  reserved, 0
=====  ==========================================================================

A daemon that takes an arena over knows nothing of the sessions of those before it: their
processes may still be reading. So before it changes a byte of a record it stores its own
number into ``reused_by``; a worker whose session began under a smaller one throws away what it
has read (``docs/protocol.md``).
"""

import secrets

from expertstore.shared.directory import PAGE_BYTES

MAGIC = int.from_bytes(b"EXPARN\x00\x01", "little")
FORMAT_VERSION = 1
TRAILER_BYTES = PAGE_BYTES
NOBODY = 2**64 - 1
"""In ``reused_by``: no session of any daemon may believe what it reads."""

_ID, _ADOPTIONS, _REUSED_BY = 2, 3, 4


class ArenaTrailer:
    """Either side's view of it; ``words`` is its mapping, of format ``Q``.

    Raises ValueError if it is not of this format.
    """

    def __init__(self, words: memoryview) -> None:
        if len(words) * 8 != TRAILER_BYTES or words[0] != MAGIC or words[1] != FORMAT_VERSION:
            raise ValueError("not an arena of this format")
        self._words = words

    @classmethod
    def format(cls, words: memoryview) -> "ArenaTrailer":
        """Writes that of a new arena into zeroed ``words``."""
        words[1] = FORMAT_VERSION
        words[_ID] = secrets.randbits(64)
        words[0] = MAGIC
        return cls(words)

    @property
    def id(self) -> int:
        """Tells this arena from all others."""
        value: int = self._words[_ID]
        return value

    @property
    def adoptions(self) -> int:
        """How many daemons have taken it over: the number of the one that has it now."""
        value: int = self._words[_ADOPTIONS]
        return value

    @property
    def reused_by(self) -> int:
        """Sessions of daemons with a smaller number may have read reused bytes."""
        value: int = self._words[_REUSED_BY]
        return value

    def adopt(self) -> None:
        """Daemon: takes the arena over, before it welcomes anybody."""
        self._words[_ADOPTIONS] = self.adoptions + 1

    def begin_reuse(self) -> None:
        """Daemon: voids all sessions of earlier daemons, before any byte is reused."""
        if self.reused_by != self.adoptions:
            self._words[_REUSED_BY] = self.adoptions

    def retire(self) -> None:
        """Daemon: voids all sessions there ever were; the arena is given up."""
        self._words[_REUSED_BY] = NOBODY

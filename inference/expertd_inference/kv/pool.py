"""Which blocks of the KV memory are free, used, or kept for a prefix that may come again."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from expertd_inference.kernels.blocks import BLOCK_TOKENS as BLOCK_TOKENS
from expertstore.errors import InvalidInputError


def num_blocks_of(num_tokens: int) -> int:
    """How many blocks hold ``num_tokens``."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockPool:
    """Counts the users of each block; pure accounting, it holds no memory.

    A block without users is free. If it has a name (:meth:`keep`) its contents stay findable
    until its room is needed; the block that was released first goes first. Whoever uses a block of
    a prefix uses all before it, and :meth:`release` lets the last block of a table go first, so
    that no block is forgotten before those that continue it.
    """

    def __init__(self, num_blocks: int) -> None:
        """Raises InvalidInputError for a pool without blocks."""
        if num_blocks < 1:
            raise InvalidInputError(
                f"The pool has {num_blocks} blocks of {BLOCK_TOKENS} tokens; give it memory for "
                "at least one."
            )
        self._num_users = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        """All of them."""
        return len(self._num_users)

    @property
    def num_free(self) -> int:
        """Blocks without users; those kept for a prefix are among them."""
        return len(self._blank) + len(self._reusable)

    @property
    def num_kept(self) -> int:
        """Blocks without users that a prefix may still find."""
        return len(self._reusable)

    def num_users(self, block: int) -> int:
        """How many tables have this block."""
        return self._num_users[block]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks with one user each, or None, and nothing changed, if fewer are free."""
        if num_blocks > self.num_free:
            return None
        return [self._take() for _ in range(num_blocks)]

    def retain(self, blocks: Iterable[int]) -> None:
        """One more user for each; a block without users may only be one that was found."""
        for block in blocks:
            if not self._num_users[block]:
                del self._reusable[block]
            self._num_users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each block of a table, or of its end."""
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if self._num_users[block]:
                continue
            if block in self._name_of:
                self._reusable[block] = None
            else:
                self._blank.append(block)

    def keep(self, block: int, name: bytes) -> None:
        """Lets :meth:`find` find ``block``, which is used and has no name, by a new ``name``."""
        self._name_of[block] = name
        self._block_of[name] = block

    def find(self, name: bytes) -> int | None:
        """The block of that name, with or without users, or None."""
        return self._block_of.get(name)

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            del self._block_of[self._name_of.pop(block)]
        self._num_users[block] = 1
        return block

"""Blocks whose first tokens another sequence may have as well, though not all of them."""

from collections.abc import Sequence

from expertd_inference.kv.pool import BlockPool

MIN_SHARED = 8
"""Tokens: for fewer it is not worth to copy a block."""
MOST_LOOKED_AT = 32
"""Of the blocks that continue one text, those that came last."""


class Beginnings:
    """What the blocks kept in a pool have, by the name of what comes before them.

    The tokens of a text end anywhere, and a block is shared only if it is full of the same ones.
    Of another block the tokens that are the same can be copied.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        # Of each block what it had last: so there are never more than blocks.
        self._had: dict[int, tuple[bytes, bytes, Sequence[int]]] = {}  # before, its name, tokens
        self._after: dict[bytes, dict[int, None]] = {}

    def note(self, block: int, name: bytes, before: bytes, tokens: Sequence[int]) -> None:
        """The pool keeps ``block``, which has these ``tokens`` after ``before``, as ``name``."""
        if block in self._had:
            self._forget(block)
        self._had[block] = before, name, tokens
        self._after.setdefault(before, {})[block] = None

    def find(self, before: bytes, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The block that has most of the first ``tokens`` after ``before``, and how many."""
        best, most = None, MIN_SHARED - 1
        for block in [*reversed(self._after.get(before, {}))][:MOST_LOOKED_AT]:
            _, name, had = self._had[block]
            if self._pool.find(name) != block:
                self._forget(block)
            elif (num := _num_equal(had, tokens)) > most:
                best, most = block, num
        return None if best is None else (best, most)

    def _forget(self, block: int) -> None:
        before, _, _ = self._had.pop(block)
        blocks = self._after[before]
        del blocks[block]
        if not blocks:
            del self._after[before]


def _num_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """Of the tokens from the first one on."""
    num = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        num += 1
    return num

"""Finds the blocks that hold the beginning of a sequence already."""

from array import array
from collections import abc
from collections.abc import Iterator
from hashlib import blake2b

from expertd_inference.engine.beginnings import MIN_SHARED, Beginnings
from expertd_inference.engine.sequence import Sequence
from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool


class Prefixes:
    """Names the full blocks of sequences in a pool, and finds them again by their tokens.

    A block's name is a hash of its tokens and of the name of the block before it, so equal names
    are equal tokens from the beginning on (128 bits: a collision needs 2**64 blocks).
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._beginnings = Beginnings(pool)
        self.num_queried = 0
        """Tokens of sequences that were looked up on their admission."""
        self.num_hit = 0
        """Those of them that were found."""

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest prefix that is kept; its last token is never among them."""
        blocks = []
        for name in self._names(sequence, (len(sequence.tokens) - 1) // BLOCK_TOKENS):
            block = self._pool.find(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find_beginning(self, sequence: Sequence, num_found: int) -> tuple[int, int] | None:
        """A block with the next tokens after ``num_found`` blocks, and how many of them it has.

        Two are left to compute: a row of its own may be rounded otherwise. None if no block has
        enough of them.
        """
        begin = num_found * BLOCK_TOKENS
        tokens = sequence.keys[begin : min(begin + BLOCK_TOKENS, len(sequence.tokens) - 2)]
        found = self._beginnings.find(self._name_before(sequence, num_found), tokens)
        if found is not None:
            # It is used now, so others make room before it.
            self._pool.retain(found[:1])
            self._pool.release(found[:1])
        return found

    def leave(self, sequence: Sequence) -> None:
        """Keeps the last block of one that is about to give its blocks back, as far as it goes."""
        index, num_tokens = divmod(sequence.num_computed, BLOCK_TOKENS)
        if num_tokens < MIN_SHARED:
            return
        tokens = sequence.keys[index * BLOCK_TOKENS : sequence.num_computed]
        before = self._name_before(sequence, index)
        name = _name(before, tokens)
        if self._pool.find(name) is None:
            block = sequence.blocks[index]
            self._pool.keep(block, name)
            self._beginnings.note(block, name, before, tokens)

    def count(self, sequence: Sequence) -> None:
        """Counts an admission, with as many tokens found as are computed already."""
        self.num_queried += len(sequence.tokens)
        self.num_hit += sequence.num_computed

    def names(self, sequence: Sequence) -> list[bytes]:
        """Those of all blocks that are full when its tokens are computed."""
        return [*self._names(sequence, len(sequence.tokens) // BLOCK_TOKENS)]

    def keep(self, sequence: Sequence, before: int) -> list[bytes]:
        """Names the blocks that became full since ``before`` tokens were computed.

        Where another block has that name already the sequence takes that one and gives its own
        back. Gives the names.
        """
        first, last = before // BLOCK_TOKENS, sequence.num_computed // BLOCK_TOKENS
        if first == last:
            return []
        names = [*self._names(sequence, last)][first:]
        for index, name in enumerate(names, start=first):
            block = sequence.blocks[index]
            known = self._pool.find(name)
            if known is None:
                self._pool.keep(block, name)
                tokens = sequence.keys[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
                self._beginnings.note(block, name, self._name_before(sequence, index), tokens)
            else:
                self._pool.retain([known])
                self._pool.release([block])
                sequence.blocks[index] = known
        return names

    def _name_before(self, sequence: Sequence, index: int) -> bytes:
        """Of the block before that one, or the salt."""
        names = [*self._names(sequence, index)]
        return names[-1] if names else sequence.salt.encode()

    def _names(self, sequence: Sequence, num_blocks: int) -> Iterator[bytes]:
        names = sequence.names
        for index in range(num_blocks):
            if index == len(names):
                before = names[-1] if names else sequence.salt.encode()
                tokens = sequence.keys[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
                names.append(_name(before, tokens))
            yield names[index]


def block_names(tokens: abc.Sequence[int], salt: str, num_blocks: int) -> list[bytes]:
    """The names of the first ``num_blocks`` blocks of ``tokens``, in every engine the same."""
    names: list[bytes] = []
    for begin in range(0, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS):
        before = names[-1] if names else salt.encode()
        names.append(_name(before, tokens[begin : begin + BLOCK_TOKENS]))
    return names


def _name(before: bytes, tokens: abc.Sequence[int]) -> bytes:
    """``before`` is the name of the block before it, or the salt."""
    # A hash's key has at most 64 bytes.
    key = before if len(before) <= 64 else blake2b(before, digest_size=64).digest()
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=key).digest()

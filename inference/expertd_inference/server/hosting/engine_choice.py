"""Which of a model's engines gets a sequence; pure: no process, no clock."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from expertd_inference.kv.pool import BLOCK_TOKENS

SEQUENCE_TOKENS = 128
"""A sequence that an engine has already counts as many rows as this: those of a short answer."""


class KnownPrefixes:
    """The names of the blocks that an engine has probably kept: of those used last, as many as fit.

    Names are those of :mod:`expertd_inference.engine.prefix`.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def match(self, names: Sequence[bytes]) -> int:
        """How many of the first ``names`` are known."""
        for count, name in enumerate(names):
            if name not in self._names:
                return count
        return len(names)

    def remember(self, names: Sequence[bytes]) -> None:
        """They are used now. The end of a prefix is forgotten before its beginning."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._num_blocks:
            self._names.popitem(last=False)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What is known of an engine: the sequences that it was given and has not completed.

    It computes ``num_places`` of them together, and keeps ``num_kept`` blocks of earlier ones.
    """

    num_sequences: int
    num_places: int
    num_kept: int = 0

    @property
    def has_place(self) -> bool:
        """Whether the next sequence need not wait for another to end."""
        return self.num_sequences < self.num_places


def choose_engine(loads: Sequence[EngineLoad], num_matched: Sequence[int]) -> int:
    """The index of the engine for a sequence of which each has ``num_matched`` blocks.

    A place at once goes before all else. Then it is the engine for which the blocks that it lacks
    and the sequences that it has are the fewest rows; of equal ones, that with the emptiest memory.
    """

    def rows(index: int) -> tuple[bool, int, int]:
        load = loads[index]
        cost = load.num_sequences * SEQUENCE_TOKENS - num_matched[index] * BLOCK_TOKENS
        return not load.has_place, cost, load.num_kept

    return min(range(len(loads)), key=rows)


def find_relief(loads: Sequence[EngineLoad]) -> tuple[int, int] | None:
    """An engine in which sequences wait, and another with a place for one; None if none need move.

    Of several, the one in which most wait, and the one with most places.
    """
    if len(loads) < 2:
        return None

    def free(index: int) -> int:
        return loads[index].num_places - loads[index].num_sequences

    fullest, emptiest = min(range(len(loads)), key=free), max(range(len(loads)), key=free)
    return (fullest, emptiest) if free(fullest) < 0 < free(emptiest) else None

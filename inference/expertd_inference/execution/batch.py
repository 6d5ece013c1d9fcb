"""The rows of one step: plain values that a scheduler plans and an executor computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from expertd_inference.fewer_experts import FewerExperts

if TYPE_CHECKING:  # plain values, without torch
    from expertd_inference.experts.adapting import Adapter
    from expertd_inference.model.seen import Seen


class Wanted(Enum):
    """Which rows of a span want logits."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence.

    ``sequence`` is its id, unique while the engine lives; ``tokens`` are the rows' own;
    ``position`` is that of the first row, so the keys and values of so many tokens are in the
    sequence's blocks already. ``blocks`` is its table of KV blocks, with room for ``position`` and
    these rows; ``state`` its slot for what the model keeps beside keys and values, None if nothing.
    Where some of the rows are of an image, ``seen`` has them; else their angles are those of
    ``position`` and ``shift``. ``fewer`` says which of the experts that routers choose compute the
    rows, None for all, and ``adapter`` what is added to the model's layers, None for nothing.
    """

    sequence: int
    tokens: Sequence[int]
    position: int
    blocks: Sequence[int]
    state: int | None
    wanted: Wanted
    shift: int = 0
    seen: "Seen | None" = None
    fewer: FewerExperts | None = None
    adapter: "Adapter | None" = None

    @property
    def num_rows(self) -> int:
        """One for each token."""
        return len(self.tokens)

    @property
    def num_wanted(self) -> int:
        """How many of the rows want logits."""
        if self.wanted is Wanted.NONE:
            return 0
        return 1 if self.wanted is Wanted.LAST else len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """The spans of one step, one or none of each sequence."""

    spans: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        """Of all spans."""
        return sum(span.num_rows for span in self.spans)

    @property
    def num_wanted(self) -> int:
        """The rows of logits that an executor gives, in order of the spans."""
        return sum(span.num_wanted for span in self.spans)

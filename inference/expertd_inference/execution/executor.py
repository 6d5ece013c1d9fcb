"""Whoever computes a step: a batch of rows goes in, logits come out."""

from typing import Protocol

from torch import Tensor

from expertd_inference.execution.batch import Batch
from expertd_inference.experts.keeping import ExpertTally


class Executor(Protocol):
    """Computes steps for one thread at a time.

    A step changes nothing but what it appends, so repeating it with the same batch is harmless. A
    span whose ``position`` is 0 begins its sequence anew.
    """

    name: str
    """``modules``, ``turns``, ``program`` or ``graphs``."""
    reason: str
    """Why this one serves, in one sentence."""
    shares_prefixes: bool
    """Whether a sequence may go on from blocks that another one has filled."""
    recurrent: bool
    """Whether there are recurrent states, in a span's slot."""
    turning_point: int | None
    """Texts of more tokens have other keys from their first token on; None where keys never change.

    A span that ends behind it goes on from nothing, or from spans that ended behind it.
    """

    tally: ExpertTally
    """Of the steps of which some row kept fewer experts than its routers chose."""

    def fits(self, batch: Batch) -> bool:
        """Whether :meth:`forward` takes this batch."""

    def forward(self, batch: Batch) -> Tensor:
        """Logits [batch.num_wanted, vocabulary], in the order of the spans and their rows.

        The sequences' blocks have the rows' keys and values afterwards. Raises StepLostError if
        the store lost what the step computed with: then repeat it; and what the store raises.
        """

    def copy_block(self, source: int, target: int) -> None:
        """Gives one block all keys and values of another; asked only if it shares prefixes.

        Raises as :meth:`forward`.
        """

    def close(self) -> None:
        """Gives its memory back; twice is harmless."""

"""How long a row of a prompt takes, as far as that was measured."""

from expertd_inference.execution.batch import Batch

_WEIGHT = 0.3
"""Of the newest step: the pace follows when another worker takes half of the cores."""


class Pace:
    """A running mean over the steps that had rows of prompts."""

    def __init__(self) -> None:
        self.ms_per_row: float | None = None
        """None before the first such step."""

    def took(self, milliseconds: float, batch: Batch) -> None:
        """A step has ended. One of decoding rows alone says little about prompts."""
        if batch.num_rows <= len(batch.spans):
            return
        now = milliseconds / batch.num_rows
        before = now if self.ms_per_row is None else self.ms_per_row
        self.ms_per_row = before + _WEIGHT * (now - before)

"""What an engine has done; needs no torch."""

from collections.abc import Mapping

import msgspec
from msgspec import structs


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has done until now.

    ``executor`` computes its steps, and ``reason`` says why that one. ``num_steps`` steps had
    ``num_rows`` rows, ``rows_mean`` each in the mean (a row is one token of one sequence).
    ``prefix_queries`` are the tokens of sequences that were looked up among earlier ones' when
    they began, and ``prefix_hits`` those that were found and not computed. ``num_preemptions``
    sequences had to give up their keys and values for others and computed them again.
    ``kv_tokens`` is how many tokens have room at once, ``kv_why`` says why so many, and
    ``kv_used`` is the share of that room, 0 to 1, that is taken.
    ``native_rows`` says, for each form of large matrix, up to how many rows native kernels
    multiply it before torch does; None is any number. ``experts_mean`` is how many experts computed
    a row of a MoE layer, in the mean.
    """

    executor: str
    reason: str
    num_steps: int
    num_rows: int
    rows_mean: float
    num_running: int
    num_waiting: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    kv_tokens: int
    kv_why: str
    kv_used: float
    native_rows: Mapping[str, int | None]
    experts_mean: float = 0.0

    def experts_mean_since(self, before: "EngineStats") -> float:
        """Of the rows that were computed after ``before``."""
        return _mean((self.num_rows, self.experts_mean), (-before.num_rows, before.experts_mean))

    def after(self, earlier: "EngineStats | None") -> "EngineStats":
        """With what an ``earlier`` engine of the same model has done counted, too."""
        if earlier is None:
            return self
        num_steps = self.num_steps + earlier.num_steps
        num_rows = self.num_rows + earlier.num_rows
        return structs.replace(
            self,
            num_steps=num_steps,
            num_rows=num_rows,
            rows_mean=num_rows / num_steps if num_steps else 0.0,
            experts_mean=_mean(
                (self.num_rows, self.experts_mean), (earlier.num_rows, earlier.experts_mean)
            ),
            prefix_queries=self.prefix_queries + earlier.prefix_queries,
            prefix_hits=self.prefix_hits + earlier.prefix_hits,
            num_preemptions=self.num_preemptions + earlier.num_preemptions,
        )


def _mean(*parts: tuple[int, float]) -> float:
    """Of numbers of rows and their means."""
    num_rows = sum(num for num, _ in parts)
    return sum(num * mean for num, mean in parts) / num_rows if num_rows else 0.0

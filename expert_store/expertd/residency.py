"""What to evict: frequency with decay, over plain arrays.

No clock, no I/O: time is counted in tokens (by the accesses of experts), since heat should fade
with work done and not while everybody sleeps.
"""

import numpy as np
import numpy.typing as npt

HALF_LIFE_TOKENS = 8
"""Accesses of this many tokens halve the weight of what came before (FACTS: aged frequency)."""

Entries = npt.NDArray[np.int64]


class Heat:
    """How hot each of a model's experts is.

    ``touches_per_token``: how many experts one token uses, all layers together.
    """

    def __init__(self, num_entries: int, touches_per_token: int) -> None:
        self._heat = np.zeros(num_entries)
        self._last = np.zeros(num_entries)
        self._now = 0.0
        self._tokens = 0.0
        self._touches_per_token = touches_per_token

    def touch(self, entries: Entries) -> None:
        """Counts accesses, in order; an entry may occur several times."""
        if not len(entries):
            return
        tokens = len(entries) / self._touches_per_token
        self._tokens += tokens
        self._now += tokens
        self.pass_time(tokens)
        self._heat += np.bincount(entries, minlength=len(self._heat))
        self._last[entries] = self._now

    def pass_time(self, num_tokens: float) -> None:
        """Ages everything by the accesses of so many tokens, here or of another model."""
        self._heat *= 0.5 ** (num_tokens / HALF_LIFE_TOKENS)

    def take_tokens(self) -> float:
        """How many tokens' accesses :meth:`touch` has counted since this was last asked."""
        tokens, self._tokens = self._tokens, 0.0
        return tokens

    def expect(self, entry: int) -> None:
        """Counts a prefetched record's arrival as its first access, which is yet to come."""
        self._heat[entry] += 1
        self._last[entry] = self._now

    def of(self, entries: Entries) -> npt.NDArray[np.float64]:
        """The heat of those entries: accesses, each halved once per half-life since."""
        heat: npt.NDArray[np.float64] = self._heat[entries]
        return heat

    def coldest(self, candidates: Entries) -> Entries:
        """The candidates, coldest first; among equals the longest unused."""
        return candidates[np.lexsort((self._last[candidates], self._heat[candidates]))]

    def idle_since(self, candidates: Entries, num_tokens: int) -> Entries:
        """Those candidates that this model's last ``num_tokens`` tokens did not use.

        Other models' tokens do not count: a slow model's step goes on beneath many of them.
        """
        # A touch's time is that of the end of the batch it came in, a sum of fractions.
        return candidates[self._last[candidates] <= self._now - num_tokens + 1e-9]

"""Frequency with decay: accesses, each halved once per half-life since."""

from collections.abc import Sequence

import numpy as np

from expertd.residency.policy import HALF_LIFE_TOKENS, Entries, Policy, Values
from expertd.settings.policy_names import PolicyName


class Aged(Policy):
    """Evicts what was used least, where an access counts half after each half-life."""

    name = PolicyName.AGED

    def __init__(self, num_experts: Sequence[int], experts_per_token: Sequence[int]) -> None:
        super().__init__(num_experts, experts_per_token)
        self._heat = np.zeros(self.num_entries)

    def pass_time(self, num_tokens: float) -> None:
        """Ages everything by so many tokens of other models."""
        super().pass_time(num_tokens)
        self._heat *= 0.5 ** (num_tokens / HALF_LIFE_TOKENS)

    def of(self, entries: Entries) -> Values:
        """Accesses, each halved once per half-life since."""
        heat: Values = self._heat[entries]
        return heat

    def _use(self, entries: Entries, stream: int, tokens: float) -> None:
        self._heat *= 0.5 ** (tokens / HALF_LIFE_TOKENS)
        self._heat += np.bincount(entries, minlength=self.num_entries)

    def _use_expected(self, entry: int) -> None:
        self._heat[entry] += 1

"""Least recently used, over all layers and models or layer by layer."""

from collections.abc import Sequence

import numpy as np

from expertd.residency.policy import Entries, Policy, Values
from expertd.settings.policy_names import PolicyName


class Lru(Policy):
    """Evicts what was not used for longest.

    Layers come in the same order in every token, so below one token's working set this
    evicts each record just before it is needed and never hits.
    """

    name = PolicyName.LRU

    def __init__(self, num_experts: Sequence[int], experts_per_token: Sequence[int]) -> None:
        super().__init__(num_experts, experts_per_token)
        self._passed = 0.0
        self._passed_at = np.zeros(self.num_entries)

    def pass_time(self, num_tokens: float) -> None:
        """Ages everything by so many tokens of other models."""
        super().pass_time(num_tokens)
        self._passed += num_tokens

    def of(self, entries: Entries) -> Values:
        """One over the tokens since the last access, and one."""
        own = (self._num_touches - self._last[entries]) / self.touches_per_token
        value: Values = 1 / (1 + own + self._passed - self._passed_at[entries])
        return value

    def _use(self, entries: Entries, stream: int, tokens: float) -> None:
        self._passed_at[entries] = self._passed

    def _use_expected(self, entry: int) -> None:
        self._passed_at[entry] = self._passed


class LruPerLayer(Policy):
    """Evicts from the layer that has most: each has equally many, its last used ones.

    As in Eliseev & Mazur (arXiv 2312.17238), who give each layer k slots.
    """

    name = PolicyName.LRU_PER_LAYER

    def __init__(self, num_experts: Sequence[int], experts_per_token: Sequence[int]) -> None:
        super().__init__(num_experts, experts_per_token)
        self._first = np.cumsum([0, *num_experts])[:-1]

    def of(self, entries: Entries) -> Values:
        """One over how many experts of its layer were used since, and one."""
        # Of all experts, not of the resident ones alone: those are the last used, so among
        # them the rank is the same.
        order = np.lexsort((-self._last, self._layer_of))
        rank = np.empty(self.num_entries)
        rank[order] = np.arange(self.num_entries) - self._first[self._layer_of]
        value: Values = self._activity / (1 + rank[entries])
        return value

    def _use(self, entries: Entries, stream: int, tokens: float) -> None:
        pass

    def _use_expected(self, entry: int) -> None:
        pass

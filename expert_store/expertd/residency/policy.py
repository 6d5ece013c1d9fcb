"""What a residency policy is: the seam between heat and the arena's slots.

No clock, no I/O, no knowledge of bytes: a policy is told which experts were used and says how
much each is worth. Who may be evicted (not what is held, leased or pinned; which model must
give) is the caller's decision, who passes candidates.

Time is counted in tokens, by the accesses of experts: heat should fade with work done and not
while everybody sleeps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

Entries = npt.NDArray[np.int64]
"""Directory entries: layers in order, experts in order."""
Values = npt.NDArray[np.float64]

HALF_LIFE_TOKENS = 8
"""Tokens, of all models together, after which another model's being idle counts double."""


class Policy(ABC):
    """How much each of a model's experts is worth keeping.

    ``num_experts`` and ``experts_per_token`` have an element per MoE layer, in order.

    Promises to its caller: all methods are cheap enough for the event loop (numpy over the
    model's experts); memory is a few numbers per expert; :meth:`coldest` gives back its
    candidates, each once, ordered by :meth:`of`; values of two models compare if both are of
    one policy and share time by :meth:`take_tokens` and :meth:`pass_time`.
    """

    name: ClassVar[str]
    """As in the setting ``policy`` and in ``expertd replay --policy``."""

    def __init__(self, num_experts: Sequence[int], experts_per_token: Sequence[int]) -> None:
        self.num_entries = sum(num_experts)
        self.touches_per_token = sum(experts_per_token)
        self._layer_of = np.repeat(np.arange(len(num_experts)), num_experts)
        self._last = np.full(self.num_entries, -np.inf)
        """Per entry, how many touches came before its last one."""
        self._num_touches = 0
        self._tokens = 0.0
        self._steps: dict[int, tuple[int, int]] = {}
        """Per stream, the layer that it visited last, and how many touches came before."""
        self._activity = 1.0
        """This model's share of all models' recent tokens."""

    def touch(self, entries: Entries, stream: int = 0) -> None:
        """Counts accesses, in order; an entry may occur several times.

        ``stream`` tells whose they are: each goes through the layers at its own pace.
        """
        if not len(entries):
            return
        tokens = len(entries) / self.touches_per_token
        self._tokens += tokens
        self._activity = 1 - (1 - self._activity) * 0.5 ** (tokens / HALF_LIFE_TOKENS)
        # Of an entry that occurs several times numpy keeps the last.
        self._last[entries] = self._num_touches + np.arange(len(entries))
        self._steps[stream] = (int(self._layer_of[entries[-1]]), self._num_touches)
        self._num_touches += len(entries)
        self._use(entries, stream, tokens)

    def pass_time(self, num_tokens: float) -> None:
        """Ages everything by so many tokens of other models."""
        self._activity *= 0.5 ** (num_tokens / HALF_LIFE_TOKENS)

    def take_tokens(self) -> float:
        """How many tokens' accesses :meth:`touch` has counted since this was last asked."""
        tokens, self._tokens = self._tokens, 0.0
        return tokens

    def expect(self, entry: int) -> None:
        """Counts a prefetched record's arrival as an access, which is yet to come."""
        self._last[entry] = self._num_touches
        self._use_expected(entry)

    def leave(self, stream: int) -> None:
        """A stream has ended."""
        self._steps.pop(stream, None)

    @abstractmethod
    def of(self, entries: Entries) -> Values:
        """What those entries are worth now, not negative: accesses per token to be expected.

        Tokens are those of all models. An order, more than a forecast: :class:`Lru` knows no
        better than one over the time since the last access.
        """

    def coldest(self, candidates: Entries) -> Entries:
        """The candidates, least worth first; among equals the longest unused."""
        return candidates[np.lexsort((self._last[candidates], self.of(candidates)))]

    def dispensable(self, candidates: Entries, num_tokens: int) -> Entries:
        """Those candidates that the steps of this model's last ``num_tokens`` tokens can spare.

        Either those tokens did not use them, or all their streams are past their layer and have
        half of the layers to go before they come to it again. Other models' tokens do not count:
        a slow model's step goes on beneath many of them.
        """
        oldest = self._num_touches - num_tokens * self.touches_per_token
        num_layers = int(self._layer_of[-1]) + 1
        ahead = np.zeros(num_layers, np.bool_)
        for layer, at in self._steps.values():
            if at >= oldest:
                ahead[(layer + np.arange(num_layers // 2 + 1)) % num_layers] = True
        idle = self._last[candidates] < oldest
        return candidates[idle | ~ahead[self._layer_of[candidates]]]

    @abstractmethod
    def _use(self, entries: Entries, stream: int, tokens: float) -> None:
        """Learns from accesses, which are ``tokens`` tokens' worth; not empty."""

    @abstractmethod
    def _use_expected(self, entry: int) -> None:
        """Learns of an access that a hint foretells."""

"""Tells the daemon which experts the next layers want, while this one computes.

For a worker whose experts do not all fit into RAM: the next layers' routers are applied to what
enters this layer's experts, and what they would choose and is absent goes to the daemon as a
hint, so that reading from disk and computing overlap (Eliseev & Mazur, arXiv 2312.17238,
section 3.2). A hint never changes a result.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import msgspec
from torch import Tensor

from expertd_inference.experts.by_token import TokenRouter
from expertd_inference.experts.foresight import Foresight
from expertd_inference.experts.hints import HintBook, HintStats, Pair
from expertd_inference.experts.routers import LayerRouter
from expertstore.errors import ExpertdError

WHOLE_SHARE = 0.75
"""Of a layer's experts: where its rows choose so many, the next layer is hinted at whole.

Of 64 experts, 8 a row, that is from 11 rows on. A guess of what the other quarter is would be wrong
for some of the rows, and a whole layer is read in the order of its file, neighbours at once.
"""


class HintTarget(Protocol):
    """What takes hints: a session."""

    nvme_misses: int

    def absent(self, experts: Sequence[Pair]) -> list[Pair]:
        """Those that are not resident just now, in order; costs no call."""

    def anything_absent(self) -> bool:
        """Whether any expert of the model is not resident just now; costs no call."""

    def hint(self, experts: Sequence[Pair], needed: Sequence[Pair] = ()) -> None:
        """Sends a hint without waiting; it supersedes what an older one has not begun.

        ``needed`` are those that are about to be acquired.
        """


class RouterAhead:
    """Asks the routers of the layers to come, and hints. Costs nothing while all is resident."""

    def __init__(
        self,
        layers: Sequence[int],
        routers: Mapping[int, LayerRouter | TokenRouter],
        target: HintTarget,
        *,
        choices: Sequence[int],
        num_experts: int | None,
        hints_prompts: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``layers`` are all MoE layers in order; those without a router are not foreseen.

        From each, so many are foreseen as :class:`Foresight` chooses of ``choices``, for one token
        ``num_experts`` of each; without a number all that the router chooses. For a few rows they
        are all that it chooses for some of them, likeliest first. Where the rows of a step choose
        nearly all experts of a layer, as in a prompt, the next layer is hinted at whole if
        ``hints_prompts``.
        """
        self._first_layer = layers[0]
        self._routers = routers
        self._target = target
        self._num_experts = num_experts
        self._foresight = Foresight(choices)
        self._hints_prompts = hints_prompts
        self._clock = clock
        self._began: float | None = None
        """When the step before began, if it was one token's and not all was in RAM."""
        self._book = HintBook(layers, max(choices))
        self._sent = False
        """Whether the last hint names anything that the daemon may still be about to read."""
        self._idle = False
        self._misses = -1

    @property
    def stats(self) -> HintStats:
        """What became of the hints so far."""
        foresight = self._foresight
        return msgspec.structs.replace(
            self._book.stats, layers_ahead=foresight.num_layers, why=foresight.why
        )

    def is_idle(self) -> bool:
        """Whether there is nothing to hint at, as all that was needed lately is in RAM."""
        try:
            self._look_whether_idle()
        except ExpertdError:
            return False
        return self._idle

    def begin(
        self,
        layer: int,
        hidden: Tensor,  # [T, H]
        top_k_index: Tensor,  # [T, k]
        num_experts: int,
    ) -> None:
        """``layer`` is about to compute: counts what was hinted for it, and hints for the next.

        A number of ``num_experts`` or more in ``top_k_index`` means "none".
        """
        try:
            if layer == self._first_layer:
                self._begin_step(num_tokens=len(hidden))
            if not self._idle:
                chosen = dict.fromkeys(top_k_index.flatten().tolist())
                self._look_ahead(layer, hidden, [x for x in chosen if x < num_experts])
        except ExpertdError:
            return  # The session is over, which whoever computes finds out now and can mend.

    def _look_ahead(self, layer: int, hidden: Tensor, chosen: Sequence[int]) -> None:
        hinted = [(layer, expert) for expert in self._book.pending(layer)]
        if hinted:
            absent = {expert for _, expert in self._target.absent(hinted)}
            self._book.arrive(layer, chosen, absent)
        whole = len(hidden) > 1 and self._names_nearly_all(layer, chosen)
        num_layers = int(self._hints_prompts) if whole else self._foresight.num_layers
        foreseen = {
            ahead: range(self._routers[ahead].num_experts)
            if whole
            else self._foresee(self._routers[ahead], hidden)
            for ahead in self._book.ahead(layer)[:num_layers]
            if ahead in self._routers
        }
        wanted = [(ahead, expert) for ahead, experts in foreseen.items() for expert in experts]
        hint = self._target.absent(wanted)
        # What this layer itself has to fetch: of few rows, where each millisecond counts.
        own = [] if whole else chosen
        needed = self._target.absent([(layer, expert) for expert in own])
        if hint or needed or self._sent:
            # One that names nothing drops what was guessed for this layer and not begun.
            self._book.issue(hint)
            self._target.hint(hint, needed)
            self._sent = bool(hint)

    def _names_nearly_all(self, layer: int, chosen: Collection[int]) -> bool:
        """Whether these are so many of ``layer`` that guessing leaves out next to nothing."""
        near = (layer, *self._book.ahead(layer))
        router = next((self._routers[each] for each in near if each in self._routers), None)
        return router is not None and len(chosen) >= WHOLE_SHARE * router.num_experts

    def _begin_step(self, num_tokens: int) -> None:
        now = self._clock()
        if self._began is not None and num_tokens == 1:
            self._foresight.step_took(now - self._began)
        self._look_whether_idle()
        self._began = now if num_tokens == 1 and not self._idle else None

    def _look_whether_idle(self) -> None:
        misses = self._target.nvme_misses
        if self._idle and misses == self._misses:
            return  # Nothing that was needed has left RAM since all was there.
        self._misses = misses
        self._idle = not self._target.anything_absent()

    def _foresee(self, router: LayerRouter | TokenRouter, hidden: Tensor) -> Sequence[int]:
        if len(hidden) > 1:
            return router.foreseen(hidden)
        if self._num_experts is None:
            chosen: list[int] = router.chosen(hidden)[0].tolist()
            return [expert for expert in chosen if expert < router.num_experts]
        likeliest: list[int] = router.likeliest(hidden, self._num_experts).tolist()
        return likeliest

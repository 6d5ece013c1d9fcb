"""Tells the daemon which experts the next layers want, while this one computes.

For a worker whose experts do not all fit into RAM: the next layers' routers are applied to what
enters this layer's experts, and what they would choose and is absent goes to the daemon as a
hint, so that reading from disk and computing overlap (Eliseev & Mazur, arXiv 2312.17238,
section 3.2). A hint never changes a result.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from expertd.errors import ExpertdError
from expertd_inference.hints import HintBook, HintStats, Pair
from expertd_inference.routers import Router


class HintTarget(Protocol):
    """What takes hints: a session."""

    nvme_misses: int

    def absent(self, experts: Sequence[Pair]) -> list[Pair]:
        """Those that are not resident just now, in order; costs no call."""

    def anything_absent(self) -> bool:
        """Whether any expert of the model is not resident just now; costs no call."""

    def prefetch(self, experts: Sequence[Pair]) -> int:
        """Sends a hint; it supersedes what an older one has not begun."""


class HintSender:
    """Sends hints from a thread of its own, so that nobody who computes waits for a call.

    One is under way at a time, and of those that come meanwhile only the newest is sent.
    """

    def __init__(self, send: Callable[[Sequence[Pair]], object]) -> None:
        """The thread starts with the first hint. ``send`` may raise ExpertdError."""
        self._send = send
        self._newest: Sequence[Pair] | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def put(self, pairs: Sequence[Pair]) -> None:
        """Has ``pairs`` sent soon, unless newer ones come first; returns at once."""
        with self._wake:
            if self._closing:
                return
            self._newest = pairs
            if self._thread is None:
                # A daemon thread: a call that hangs must not hold up the process's exit.
                self._thread = threading.Thread(target=self._run, name="hints", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        """Sends no more; a second call does nothing."""
        with self._wake:
            self._closing = True
            self._newest = None
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._newest is None and not self._closing:
                    self._wake.wait()
                if self._newest is None:
                    return
                pairs, self._newest = self._newest, None
            try:
                self._send(pairs)
            except ExpertdError:
                # Whatever it is, who fetches meets it too, and can do something about it.
                continue


class RouterAhead:
    """Asks the routers of the layers to come, and hints. Costs nothing while all is resident."""

    def __init__(
        self,
        layers: Sequence[int],
        routers: Mapping[int, Router],
        target: HintTarget,
        *,
        num_layers: int,
        num_experts: int | None,
    ) -> None:
        """``layers`` are all MoE layers in order; those without a router are not foreseen.

        From each, ``num_layers`` are foreseen, for one token ``num_experts`` of each; without a
        number, and for a prompt, all experts that the router chooses for some of the tokens.
        """
        self._first_layer = layers[0]
        self._routers = routers
        self._target = target
        self._num_experts = num_experts
        self._book = HintBook(layers, num_layers)
        self._sender = HintSender(target.prefetch)
        self._idle = False
        self._misses = -1

    @property
    def stats(self) -> HintStats:
        """What became of the hints so far."""
        return self._book.stats

    def close(self) -> None:
        """Hints no more; a second call does nothing."""
        self._sender.close()

    def begin(self, layer: int, hidden: Tensor, top_k_index: Tensor) -> None:  # [T, H], [T, k]
        """``layer`` is about to compute: counts what was hinted for it, and hints for the next."""
        try:
            if layer == self._first_layer:
                self._begin_step()
            if not self._idle:
                self._look_ahead(layer, hidden, top_k_index)
        except ExpertdError:
            return  # The session is over, which whoever computes finds out now and can mend.

    def _look_ahead(self, layer: int, hidden: Tensor, top_k_index: Tensor) -> None:
        hinted = [(layer, expert) for expert in self._book.pending(layer)]
        if hinted:
            needed = set(top_k_index.flatten().tolist())
            absent = {expert for _, expert in self._target.absent(hinted)}
            self._book.arrive(layer, needed, absent)
        foreseen = {
            ahead: self._foresee(self._routers[ahead], hidden)
            for ahead in self._book.ahead(layer)
            if ahead in self._routers
        }
        wanted = [(ahead, expert) for ahead, experts in foreseen.items() for expert in experts]
        hint = self._target.absent(wanted)
        if hint:
            self._book.issue(hint)
            self._sender.put(hint)

    def _begin_step(self) -> None:
        misses = self._target.nvme_misses
        if self._idle and misses == self._misses:
            return  # Nothing that was needed has left RAM since all was there.
        self._misses = misses
        self._idle = not self._target.anything_absent()

    def _foresee(self, router: Router, hidden: Tensor) -> Sequence[int]:
        if self._num_experts is None or len(hidden) > 1:
            return router.foreseen(hidden)
        likeliest: list[int] = router.likeliest(hidden, self._num_experts).tolist()
        return likeliest

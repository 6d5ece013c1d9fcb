"""Fewer experts than routers choose: those that are dropped become "none", for all that follows.

So they are not looked up, fetched, hinted at, copied or computed. The others keep the weights that
the router gave them, as in Pan et al., *Dense Training, Sparse Inference* (arXiv 2404.05567), whose
models lose little by it; scaled to the sum of all, the example model predicted worse.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from expertd_inference.experts.call import ExpertsCall
from expertd_inference.fewer_experts import ALL_EXPERTS, FewerExperts


class ExpertTally:
    """How many experts computed a row of a MoE layer, in the mean over rows that kept fewer."""

    def __init__(self) -> None:
        self.num_rows = 0
        """Of steps of which some row kept fewer, counted once for each layer."""
        self.num_experts = 0
        """Those that computed them."""

    def add(self, num_rows: int, num_experts: int) -> None:
        """Of all layers of a step."""
        self.num_rows += num_rows
        self.num_experts += num_experts


class KeptExperts:
    """Which experts the rows of a step keep."""

    def __init__(
        self, spans: Iterable[tuple[FewerExperts | None, int]], device: torch.device
    ) -> None:
        """``spans`` are numbers of consecutive rows, None for those that keep all experts."""
        self._device = device
        self._rows = [fewer or ALL_EXPERTS for fewer, num in spans for _ in range(num)]
        self._counts: list[Tensor] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_most(self) -> int:
        """That all rows together can have."""
        return sum(fewer.most for fewer in self._rows)

    @cached_property
    def _limits(self) -> tuple[Tensor, Tensor]:  # [T, 1] each
        """Made when it is first asked for: a program drops experts by itself."""
        most = torch.tensor([fewer.most for fewer in self._rows], device=self._device)
        least = torch.tensor([fewer.least_share for fewer in self._rows], device=self._device)
        return most[:, None], least[:, None]

    def of(self, weights: Tensor, index: Tensor, none: int) -> Tensor:
        """``index`` [T, k] of rows with these ``weights`` [T, k]; what is dropped becomes ``none``.

        Waits for no device.
        """
        wide = weights.float()
        rank = wide.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # One after the other, whatever the number of rows: a row's bits are its own.
        total = wide.cumsum(dim=1)[:, -1:]
        most, least_share = (each.to(wide.device) for each in self._limits)
        dropped = ((rank >= most) | (wide < least_share * total)) & (rank > 0)
        return index.masked_fill(dropped, none)

    def count(self, index: Tensor, none: int) -> None:
        """A layer computes rows by ``index``."""
        self._num_rows += len(index)
        self._counts.append((index < none).sum())

    def add_to(self, tally: ExpertTally) -> None:
        """What was counted; the host waits for the device."""
        if self._counts:
            tally.add(self._num_rows, int(torch.stack(self._counts).sum()))


class _Step(threading.local):
    kept: KeptExperts | None = None


_step = _Step()


@contextmanager
def keeping(kept: KeptExperts | None) -> Iterator[None]:
    """While this thread computes rows that keep ``kept``, None if they keep all."""
    before, _step.kept = _step.kept, kept
    try:
        yield
    finally:
        _step.kept = before


def kept_of(num_rows: int) -> KeptExperts | None:
    """What so many rows keep that this thread computes; None if all."""
    kept = _step.kept
    return kept if kept is not None and len(kept) == num_rows else None


def keep_fewer(call: ExpertsCall) -> ExpertsCall:
    """The call with the experts that its rows keep."""
    kept = _step.kept
    if kept is None:
        return call
    routed, none = call.routed, call.num_experts
    index = kept.of(routed.weights, routed.index, none)
    kept.count(index, none)
    return call.with_rows(replace(routed, index=index))

"""Lets a model's experts be those of a routing, in the place of what its routers choose."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_routing import Routing
from expertd_inference.experts.call import ExpertsCall, ExpertsRunner, seat_of
from expertd_inference.model.loading import TrunkModel

GUESSED_RIGHT = 0.85
"""How often the next layer's router, applied to this layer's input, names an expert that is then
used; typical of trained models. Random ones have nothing to guess from."""


class LaunchCount(TorchDispatchMode):
    """Counts torch's operations that launch a kernel, in the trunk and in the experts.

    Views and allocations launch nothing. Our own kernels are not torch's, and an operation may
    launch several: a step launches at least so many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = self.experts = 0
        self.in_experts = False

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Does what was asked for."""
        if not func.is_view and "empty" not in func.name():
            if self.in_experts:
                self.experts += 1
            else:
                self.trunk += 1
        return func(*args, **(kwargs or {}))


class Replay:
    """The experts of ``trunk``, connected to their runners, follow ``routing`` from now on."""

    def __init__(self, trunk: TrunkModel, routing: Routing, where: torch.device) -> None:
        self.counter = torch.zeros(1, dtype=torch.int64, device=where)
        """The token's number; on the device, so that recorded steps have other experts too."""
        self.launches: LaunchCount | None = None
        self._trunk, self._routing = trunk, routing
        for place, layer in enumerate(sorted(trunk.experts)):
            seat = seat_of(trunk.experts[layer])
            rows = routing.experts[:, place].contiguous().to(where)
            seat.runner = _Replayed(self, seat.runner, rows)

    def routers(self) -> dict[int, "Guesses"]:
        """What guesses the next layers' experts, right as often as real routers are."""
        chance = torch.Generator().manual_seed(1)
        tokens, _, k = self._routing.experts.shape
        num_experts = int(self._routing.experts.max()) + 1
        routers = {}
        for place, layer in enumerate(sorted(self._trunk.experts)):
            rows = self._routing.experts[:, place].clone()
            wrong = torch.rand(tokens, k, generator=chance) > GUESSED_RIGHT
            rows[wrong] = torch.randint(num_experts, (int(wrong.sum()),), generator=chance)
            routers[layer] = Guesses(rows.to(self.counter.device), self.counter)
        return routers


class Guesses:
    """In the place of a router that is asked ahead of time."""

    def __init__(self, rows: Tensor, counter: Tensor) -> None:  # [tokens, k]
        self._rows, self._counter = rows, counter

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:  # [num]
        """Experts of the token whose number the counter has."""
        return self._rows.index_select(0, self._counter)[0, :num]


class _Replayed:
    """Before a runner: the experts are those that the counter's row says."""

    def __init__(self, replay: Replay, runner: ExpertsRunner, rows: Tensor) -> None:
        self._replay, self._runner, self._rows = replay, runner, rows

    def run(self, call: ExpertsCall, /) -> Tensor:
        """As the runner, for the experts of the routing."""
        routed = call.routed
        if len(routed) == 1:
            index = self._rows.index_select(0, self._replay.counter)
            call = call.with_rows(replace(routed, index=index))
        with ExitStack() as stack:
            if (launches := self._replay.launches) is not None:
                launches.in_experts = True
                stack.callback(setattr, launches, "in_experts", False)
            return self._runner.run(call)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """As it is."""
        return call

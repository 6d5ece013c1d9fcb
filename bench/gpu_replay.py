"""Lets a model's experts be those of a routing, in the place of what its routers choose."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_routing import Routing
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
    """The experts of ``trunk`` follow ``routing`` from now on, until :meth:`close`.

    The first row of a step has the experts of the token that the counter names, the next ones
    those of the tokens after it. They are put in where the model calls its experts, so recorded
    steps have them, too.
    """

    def __init__(self, trunk: TrunkModel, routing: Routing, where: torch.device) -> None:
        self.counter = torch.zeros(1, dtype=torch.int64, device=where)
        """The token's number; on the device, so that recorded steps have other experts too."""
        self.launches: LaunchCount | None = None
        self._trunk, self._routing = trunk, routing
        self._hooks = []
        for place, layer in enumerate(sorted(trunk.experts)):
            rows = routing.experts[:, place].contiguous().to(where)
            module = trunk.experts[layer]
            self._hooks += [
                module.register_forward_pre_hook(partial(self._enter, rows)),
                module.register_forward_hook(self._leave),
            ]

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

    def close(self) -> None:
        """The routers' choices are the experts again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, rows: Tensor, _: Any, given: Any) -> Any:  # noqa: ANN401 - torch's
        if self.launches is not None:
            self.launches.in_experts = True
        hidden, _, weights = given
        return hidden, rows_of(rows, self.counter, len(hidden)), weights

    def _leave(self, *_: Any) -> None:  # noqa: ANN401 - torch's
        if self.launches is not None:
            self.launches.in_experts = False


class Guesses:
    """In the place of a router that is asked ahead of time."""

    def __init__(self, rows: Tensor, counter: Tensor) -> None:  # [tokens, k]
        self._rows, self._counter = rows, counter

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:  # [num]
        """Experts of the tokens that the rows stand for: first the likeliest of each."""
        return rows_of(self._rows, self._counter, len(hidden)).T.flatten()[:num]


def rows_of(rows: Tensor, counter: Tensor, num: int) -> Tensor:  # [num, k]
    """Of ``rows`` [tokens, k] those from the counter on, and from the first after the last."""
    numbers = counter + torch.arange(num, device=counter.device)
    return rows.index_select(0, numbers % len(rows))

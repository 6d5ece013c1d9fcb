"""``--exact`` for modules: the bits of a row do not depend on which other rows a step has.

Native kernels promise that themselves. What torch computes of several rows it may add up in
another order than of one. So a router that torch multiplies is asked row by row here, and whether
that was all is tried when a worker loads (:func:`.check.check_exact`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def make_exact(model: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Lets each of ``model``'s own routers compute all numbers of rows in one way.

    No class is changed: a router has a ``forward`` of its own, which calls its class's.
    """
    for block in model.modules():
        if not hasattr(block, "experts"):
            continue
        for module in block.children():
            if _multiplies_by_torch(module) and "forward" not in vars(module):
                module.forward = partial(_row_by_row, module.forward)


def _multiplies_by_torch(module: nn.Module) -> bool:
    """Whether it is a router with a matrix of its own that no native kernel multiplies with."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 2
        and not isinstance(module, nn.Linear | nn.Embedding)
    )


def _row_by_row(forward: Callable[..., Any], hidden_states: Tensor, *more: Any) -> Any:  # noqa: ANN401
    """What a router's ``forward`` gives when it is asked for each row."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    if len(rows) < 2:
        return forward(hidden_states, *more)
    answers = [forward(row, *more) for row in torch.split(rows, 1)]
    return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))

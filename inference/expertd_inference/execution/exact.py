"""``--exact`` for modules: the bits of a row do not depend on which other rows a step has.

Native kernels promise that themselves. What torch computes of several rows it may add up in
another order than of one. So a router that torch multiplies is asked row by row here, and whether
that was all is tried when a worker loads (:func:`.check.check_exact`).
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.execution.lean import LEAN_ROWS


def make_exact(model: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Lets each of ``model``'s own routers and norms compute all numbers of rows in one way."""
    classes: dict[type, type] = {}
    for block in model.modules():
        if not hasattr(block, "experts"):
            continue
        for module in block.children():
            if _multiplies_by_torch(module):
                kind = type(module)
                if kind not in classes:
                    classes[kind] = _row_by_row(kind)
                module.__class__ = classes[kind]
    for module in model.modules():
        if hasattr(module, LEAN_ROWS):
            setattr(module, LEAN_ROWS, sys.maxsize)


def _multiplies_by_torch(module: nn.Module) -> bool:
    """Whether it is a router with a matrix of its own that no native kernel multiplies with."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 2
        and not isinstance(module, nn.Linear | nn.Embedding)
        and not hasattr(module, "expertd_normalize")
    )


def _row_by_row(kind: Any) -> type:  # noqa: ANN401 - known at run time
    class RowByRow(kind):  # type: ignore[misc] # of a class that is known at run time
        """A router that is asked for each row."""

        def forward(self, hidden_states: Tensor, *more: Any) -> Any:  # noqa: ANN401 - as theirs
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            if len(rows) < 2:
                return super().forward(hidden_states, *more)
            answers = [super(RowByRow, self).forward(row, *more) for row in torch.split(rows, 1)]
            return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))

    RowByRow.__name__ = RowByRow.__qualname__ = f"RowByRow{kind.__name__}"
    return RowByRow

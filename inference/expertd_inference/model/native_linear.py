"""Plain linear layers of the trunk that native kernels compute for few rows.

torch multiplies one row with a 16-bit matrix at a third of the rate of a plain read or less. So
each ``nn.Linear`` gives its place to one of ours, before the first step: its weight stays where it
is, which is the mapped trunk file of a pack, and so do its name and what a state dict has of it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.kernels.cpu.linear import DTYPES, LinearKernels, PreparedCall, describe


class NativeLinear(nn.Linear):
    """Takes the place of an ``nn.Linear``, whose weight and bias it shares.

    A product of few rows is native, and rounded once, bias included, as torch's is. torch computes
    more rows than are faster here on this host, other devices and dtypes, and what gradients are
    wanted of.
    """

    def __init__(self, linear: nn.Linear, kernels: LinearKernels) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._kernels = kernels
        self._prepared: tuple[object, PreparedCall | None] = (None, None)

    def forward(self, rows: Tensor) -> Tensor:
        """``rows`` [..., in] to [..., out]."""
        weight = self.weight
        if (
            type(rows) is not Tensor
            or rows.dtype is not weight.dtype
            or rows.shape[-1] != self.in_features
            or not rows.is_cpu
            or (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
            or not self._kernels.takes(rows.numel() // self.in_features, weight)
            or (call := self._prepare()) is None
        ):
            return super().forward(rows)
        rows = rows.contiguous()
        out = rows.new_empty(*rows.shape[:-1], self.out_features)
        self._kernels.multiply(call, rows, out, rows.numel() // self.in_features)
        return out

    def _prepare(self) -> PreparedCall | None:
        """The product with the bias; None if no kernel knows it. Made anew for another weight."""
        weight, bias = self.weight, self.bias
        where = weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.dtype
        if self._prepared[0] != where:
            known = weight.dtype in DTYPES and all(
                x.is_cpu and x.is_contiguous() and x.dtype is weight.dtype
                for x in (weight, bias)
                if x is not None
            )
            self._prepared = where, PreparedCall(describe(weight, bias)) if known else None
        return self._prepared[1]


def use_native_linears(model: Any, kernels: LinearKernels) -> None:  # noqa: ANN401 - untyped
    """Puts a :class:`NativeLinear` in the place of each ``nn.Linear`` in ``model``."""
    made: dict[nn.Module, NativeLinear] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                if child not in made:
                    made[child] = NativeLinear(child, kernels)
                setattr(module, name, made[child])

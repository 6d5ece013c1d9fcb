"""Linear layers of one native call for a token, quantized or plain.

A plain layer is multiplied by torch only for so many rows that this is faster on this host. The
weight stays where it is, which is the mapped trunk file of a pack.
"""

from typing import Any

from torch import Tensor, nn

from expertd_inference.kernels.cpu.library import TYPES
from expertd_inference.kernels.cpu.step import DTYPES, PreparedCall, StepKernels, describe
from expertd_inference.model.quantized_linear import QuantizedLinear


def lean_linear(module: Any, kernels: StepKernels) -> type | None:  # noqa: ANN401 - untyped
    """The class to give to ``module``, or None if it is no linear layer that is known."""
    if type(module) is QuantizedLinear:
        return _quantized_class(kernels)
    if type(module) is nn.Linear:
        return _plain_class(kernels)
    return None


def call_directly(self: Any, rows: Tensor) -> Any:  # noqa: ANN401 - a module
    """``__call__`` of a module with nothing hooked to it, at a third of nn.Module's cost."""
    if self._forward_hooks or self._forward_pre_hooks:
        return nn.Module.__call__(self, rows)
    return self.forward(rows)


def _quantized_class(kernels: StepKernels) -> type:
    class LeanQuantizedLinear(QuantizedLinear):
        """For one row a call prepared before, for more what the layer does anyway."""

        __call__ = call_directly

        def expertd_prepared(self) -> PreparedCall | None:
            """The product, without the bias; None if no kernel knows it."""
            # Whoever moves or loads the layer gives it another weight.
            weight = self.quantized
            prepared = self.__dict__.get("_prepared")
            if prepared is None or prepared[0] is not weight:
                prepared = self.__dict__["_prepared"] = (weight, kernels.prepare(weight))
            call: PreparedCall | None = prepared[1]
            return call

        def forward(self, rows: Tensor) -> Tensor:
            call = self.expertd_prepared()
            if (
                call is None
                or self._parameters.get("bias") is not None
                or rows.numel() != self.in_features
                or rows.dtype not in TYPES
                or not rows.is_contiguous()
                or not rows.is_cpu
            ):
                return super().forward(rows)
            out = rows.new_empty(*rows.shape[:-1], self.out_features)
            kernels.multiply(call, rows, out)
            return out

    return LeanQuantizedLinear


def _plain_class(kernels: StepKernels) -> type:
    class LeanLinear(nn.Linear):
        """A native product for few rows, rounded once, bias included, as torch's is."""

        __call__ = call_directly

        def expertd_prepared(self) -> PreparedCall | None:
            """The product with the bias; None if no kernel knows it."""
            weight, bias = self._parameters["weight"], self._parameters.get("bias")
            assert weight is not None
            where = weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.dtype
            prepared = self.__dict__.get("_prepared")
            if prepared is None or prepared[0] != where:
                prepared = self.__dict__["_prepared"] = where, _prepare(weight, bias)
            call: PreparedCall | None = prepared[1]
            return call

        def forward(self, rows: Tensor) -> Tensor:
            call = None
            if (
                rows.dtype is self.weight.dtype
                and rows.shape[-1] == self.in_features
                and rows.is_cpu
                and not rows.requires_grad
                and kernels.takes(rows.numel() // self.in_features, self.weight)
            ):
                call = self.expertd_prepared()
            if call is None:
                return super().forward(rows)
            rows = rows.contiguous()
            out = rows.new_empty(*rows.shape[:-1], self.out_features)
            kernels.multiply(call, rows, out, rows.numel() // self.in_features)
            return out

    return LeanLinear


def _prepare(weight: Tensor, bias: Tensor | None) -> PreparedCall | None:
    known = weight.dtype in DTYPES and all(
        x.is_cpu and x.is_contiguous() and x.dtype is weight.dtype
        for x in (weight, bias)
        if x is not None
    )
    return PreparedCall(describe(weight, bias)) if known else None

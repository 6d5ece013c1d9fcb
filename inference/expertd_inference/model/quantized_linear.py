"""A linear layer of the trunk whose weight stays quantized in memory."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertd_inference.kernels.gpu.choice import gpu_kernels
from expertd_inference.kernels.weights import Linear, QuantizedWeight
from expertstore.errors import PackError
from expertstore.pack.codec import TORCH_DTYPES, dequantize
from expertstore.pack.layout import Matrix, matrix_parts, scale_types


class QuantizedLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` of the same sizes, with its bias.

    The weight's parts are buffers, and so go where the model goes; they are no part of the
    state dict, since they are loaded by :meth:`load` and by nothing else. Casting the model
    leaves their types alone. On CUDA the product is that of ``kernels.gpu_choice``, elsewhere
    that of the ``linear`` given to :meth:`load`.
    """

    def __init__(self, linear: nn.Linear, matrix: Matrix) -> None:
        """``matrix`` says how the weight is written. Raises PackError if it does not fit."""
        super().__init__()
        if (linear.out_features, linear.in_features) != (matrix.out_features, matrix.in_features):
            raise PackError(f"{matrix.name} in the trunk does not fit the pack's config.json.")
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.matrix = matrix
        self.bias = linear.bias
        self._dtype = linear.weight.dtype
        self._buffer_names: dict[str, str] = {}
        self._types: dict[str, set[torch.dtype]] = {}
        for name, shape, dtype in matrix_parts(matrix, ""):
            self._types[name] = {TORCH_DTYPES[each] for each in scale_types(name, dtype)}
            # A buffer's name may have no dots.
            buffer = name.removeprefix(f"{matrix.name}.").replace(".", "_")
            self._buffer_names[name] = buffer
            empty = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=linear.weight.device)
            self.register_buffer(buffer, empty, persistent=False)
        # Else transformers would draw random weights for what it takes for missing.
        self._is_hf_initialized = True
        self._linear: Linear | None = None
        self._product: Linear = _not_loaded
        self.quantized = QuantizedWeight(matrix, self._parts())

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself, with the precision."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.matrix.bits}, "
            f"group_size={self.matrix.group_size}"
        )

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], dequantized anew each time, in the dtype of the layer replaced.

        For code that looks at a layer's weight; :meth:`forward` never makes it.
        """
        return dequantize(self.matrix, self.quantized.parts, self._dtype)

    def load(self, parts: Mapping[str, Tensor], linear: Linear) -> None:
        """Takes ``parts`` as they are, without a copy if this module is on their device.

        Raises PackError if one is missing or of another shape.
        """
        for name, buffer in self._buffer_names.items():
            expected: Tensor = getattr(self, buffer)
            part = parts.get(name)
            if part is None or part.shape != expected.shape or part.dtype not in self._types[name]:
                raise PackError(f"{name} is missing in the trunk or has another shape; pack again.")
            setattr(self, buffer, part.to(expected.device))
        self._linear = linear
        self._settle()

    def forward(self, rows: Tensor) -> Tensor:
        """``rows`` [..., in] to [..., out]; the bias is added after the product was rounded.

        Kernels give no gradients: for rows that want some torch multiplies by :attr:`weight`.
        """
        if rows.requires_grad and torch.is_grad_enabled():
            return functional.linear(rows, self.weight.to(rows.dtype), self.bias)
        result = self._product(rows, self.quantized)
        return result if self.bias is None else result + self.bias

    def _parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, buffer) for name, buffer in self._buffer_names.items()}

    def _settle(self) -> None:
        """After the parts have changed or moved."""
        self.quantized = QuantizedWeight(self.matrix, self._parts())
        if self._linear is not None:
            self._product = _linear_on(
                getattr(self, self._buffer_names[f"{self.matrix.name}.q"]), self._linear
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``cuda`` and ``half`` call: moves the parts, and leaves their types."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's
        for name, before in buffers.items():
            after: Any = self._buffers[name]
            if before is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self._settle()
        return self


def _not_loaded(rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
    raise AssertionError(f"{weight.matrix.name} was never loaded")


def _linear_on(part: Tensor, linear: Linear) -> Linear:
    """The product on the device of ``part``."""
    if not part.is_cuda:
        return linear
    return gpu_kernels().linear

"""From how many rows on torch multiplies a model's matrices: worked out when an engine opens.

Else the first long prompt would wait for it (:mod:`expertd_inference.kernels.cpu.switching`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from expertd_inference.experts.call import has_seat, seat_of
from expertd_inference.experts.cpu import experts_modules
from expertd_inference.kernels.cpu.choice import CpuKernels
from expertd_inference.kernels.cpu.library import TYPES
from expertd_inference.kernels.cpu.linear import plain_matrix
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.switching import Form, Switching
from expertd_inference.model.native_linear import NativeLinear
from expertd_inference.model.quantized_linear import QuantizedLinear

Rows = dict[str, int | None]
"""Up to how many rows native kernels multiply a form of matrix; None: any number."""


def measure_crossover(
    model: Any,  # noqa: ANN401 - transformers is untyped
    kernels: CpuKernels,
    say: Callable[[str], None],
) -> tuple[Rows, Rows]:
    """Of the experts and of the linear layers; both empty for kernels that never change over.

    ``say`` is told once if what was measured cannot be kept.
    """
    if not isinstance(kernels, NativeKernels) or not isinstance(kernels.most_rows, Switching):
        return {}, {}
    measure = kernels.most_rows.measure
    return measure(_experts(model), say), measure(_linears(model), say)


def _experts(model: Any) -> Iterator[Form]:  # noqa: ANN401
    for module in experts_modules(model).values():
        if has_seat(module) and model.dtype in TYPES:
            yield seat_of(module).spec.layout.inward, model.dtype


def _linears(model: Any) -> Iterator[Form]:  # noqa: ANN401
    """Of quantized ones, and of plain ones that native kernels compute for few rows."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            yield module.matrix, model.dtype
        elif isinstance(module, NativeLinear):
            yield plain_matrix(module.weight), module.weight.dtype

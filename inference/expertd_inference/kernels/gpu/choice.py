"""Which kernels a GPU computes with: the one place that decides.

Today Triton's serve everything. Where a library measures better for a scheme on some GPU
(``python -m bench.gpu_kernels`` compares), it is to be put in here, behind the same functions.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from torch import Tensor

from expertd_inference.kernels.wave import CachedWave, Routed
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.errors import PreconditionError


class GpuKernels(Protocol):
    """What computes experts and quantized linear layers on a GPU; nothing waits for it."""

    @property
    def name(self) -> str:
        """As results show it."""

    def fill_slots_cached(self, slots: Tensor, routed: Routed, wave: CachedWave, /) -> None:
        """As :func:`.triton_experts.fill_slots_cached`."""

    def linear(self, rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
        """``rows`` [..., in] times the weight: [..., out]."""


class TritonKernels:
    """Ours, compiled for the GPU when they are first called."""

    name = "triton"

    def __init__(self) -> None:
        # Here: Triton takes a second to import, and a machine without a GPU need not have it.
        experts: Any = import_module("expertd_inference.kernels.gpu.triton_experts")
        linear: Any = import_module("expertd_inference.kernels.gpu.triton_linear")
        self.fill_slots_cached = experts.fill_slots_cached
        self.linear = linear.linear


@cache
def gpu_kernels() -> GpuKernels:
    """The kernels of this host. Raises PreconditionError where Triton is not installed."""
    if find_spec("triton") is None:
        raise PreconditionError(
            "A GPU needs Triton, which is not installed here; install a CUDA build of torch, "
            "which brings it, or leave out --device."
        )
    return TritonKernels()

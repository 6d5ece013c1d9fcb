"""A quantized matrix as kernels take it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from expertstore.pack.layout import Matrix


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """``matrix`` [out, in] by its parts, all on one device.

    The parts have the names, shapes and dtypes of :class:`~expertstore.pack.layout.Matrix`: for one
    that is called NAME, ``NAME.q``, ``NAME.scale`` and so on.
    """

    matrix: Matrix
    parts: Mapping[str, Tensor]


class Linear(Protocol):
    """``rows`` [..., in], floating, times a quantized matrix: [..., out] of the rows' dtype.

    Accumulated in float32 and rounded once.
    """

    def __call__(self, rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
        """The product."""

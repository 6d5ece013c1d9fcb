"""Which kernels a CPU worker computes with."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu import reference
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.reference import ExpertsSpec, empty_slots, sum_slots
from expertd_inference.kernels.weights import QuantizedWeight
from expertd_inference.settings import KernelsName
from expertstore.errors import InvalidInputError
from expertstore.pack.layout import Encoding
from expertstore.pack.manifest import Manifest


class CpuKernels(Protocol):
    """What computes experts and quantized linear layers on the CPU."""

    @property
    def name(self) -> str:
        """As ``--kernels`` has it."""

    def fill_slots(
        self,
        slots: Tensor,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        experts: Sequence[int],
        records: Sequence[int],
        arena: ArenaTensors,
        spec: ExpertsSpec,
    ) -> None:
        """As :func:`.reference.fill_slots`."""

    def output(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        experts: Sequence[int],
        records: Sequence[int],
        arena: ArenaTensors,
        spec: ExpertsSpec,
        memo: dict[str, Any] | None = None,
    ) -> Tensor:
        """The layer's output [T, H], where ``experts`` are all that are needed.

        The same bits as filling slots in waves and summing them. ``memo`` belongs to a caller
        whose ``spec`` and tensors, of one token, are the very same at every call with it: what
        is made of them, the result's memory included, may be kept there.
        """

    def linear(self, rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
        """``rows`` [..., in] times the weight: [..., out]."""


class ReferenceKernels:
    """Plain torch, everywhere."""

    name = "reference"
    fill_slots = staticmethod(reference.fill_slots)
    linear = staticmethod(reference.linear)

    @staticmethod
    def output(
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        experts: Sequence[int],
        records: Sequence[int],
        arena: ArenaTensors,
        spec: ExpertsSpec,
        memo: dict[str, Any] | None = None,
    ) -> Tensor:
        """As :class:`CpuKernels` says."""
        slots = empty_slots(hidden, top_k_weights)
        ReferenceKernels.fill_slots(
            slots,
            hidden,
            top_k_index,
            top_k_weights,
            experts=experts,
            records=records,
            arena=arena,
            spec=spec,
        )
        return sum_slots(slots, hidden.dtype)


def cpu_kernels(
    name: KernelsName | str, manifest: Manifest, say: Callable[[str], None] = lambda _: None
) -> CpuKernels:
    """The kernels of that name for a pack.

    ``auto`` takes the native ones where they are, and tells ``say`` if they are not; for a pack
    of 16-bit experts it takes the reference, which gives the very bits of stock transformers.
    Raises InvalidInputError for another name, PreconditionError for ``native`` without them.
    """
    try:
        chosen = KernelsName(name)
    except ValueError:
        known = ", ".join(KernelsName)
        raise InvalidInputError(f"There are no kernels called {name}; known are {known}.") from None
    if chosen is KernelsName.NATIVE:
        return NativeKernels()
    if chosen is KernelsName.REFERENCE or _is_plain(manifest):
        return ReferenceKernels()
    loaded = native_library()
    if loaded.library is None:
        say(f"computing with the slow reference kernels: {loaded.reason}")
        return ReferenceKernels()
    return NativeKernels()


def _is_plain(manifest: Manifest) -> bool:
    return all(
        matrix.encoding is Encoding.PLAIN
        for layout in manifest.layouts
        for matrix in layout.matrices
    )

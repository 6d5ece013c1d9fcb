"""Which kernels a CPU worker computes with."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from expertd_inference.kernels.cpu import reference
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels, PreparedExperts
from expertd_inference.kernels.cpu.reference import sum_slots
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
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

    def fill_slots(self, slots: Tensor, routed: Routed, wave: Wave, /) -> None:
        """As :func:`.reference.fill_slots`."""

    def output(
        self, routed: Routed, wave: Wave, prepared: PreparedExperts | None = None, /
    ) -> Tensor:
        """The layer's output [T, H], where the wave has all experts that are needed.

        The same bits as filling slots in waves and summing them. With ``prepared``, which
        :meth:`prepare` made for ``routed``, no row may name "none", and the result is good until
        the next call with it.
        """

    def prepare(self, routed: Routed, spec: ExpertsSpec, /) -> PreparedExperts | None:
        """What can be worked out once for a call whose tensors stay the very same.

        None where that is nothing.
        """

    def linear(self, rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
        """``rows`` [..., in] times the weight: [..., out]."""


class ReferenceKernels:
    """Plain torch, everywhere."""

    name = "reference"
    linear = staticmethod(reference.linear)

    def __init__(self, fill_slots: Callable[[Tensor, Routed, Wave], None] | None = None) -> None:
        """``fill_slots`` in the place of the reference's own."""
        self._fill_slots = fill_slots or reference.fill_slots

    def fill_slots(self, slots: Tensor, routed: Routed, wave: Wave, /) -> None:
        """As :class:`CpuKernels` says."""
        self._fill_slots(slots, routed, wave)

    def output(self, routed: Routed, wave: Wave, _: PreparedExperts | None = None, /) -> Tensor:
        """As :class:`CpuKernels` says."""
        slots = routed.empty_slots()
        self.fill_slots(slots, routed, wave)
        return sum_slots(slots, routed.rows.dtype)

    @staticmethod
    def prepare(_: Routed, __: ExpertsSpec, /) -> None:
        """Nothing."""


def cpu_kernels(
    name: KernelsName | str,
    manifest: Manifest,
    say: Callable[[str], None] = lambda _: None,
    *,
    exact: bool = False,
    activations: int = 16,
) -> CpuKernels:
    """The kernels of that name for a pack.

    ``auto`` takes the native ones where they are, and tells ``say`` if they are not; for a pack
    of 16-bit experts it takes the reference, which computes them as stock transformers does.
    ``exact`` and ``activations`` are for :class:`NativeKernels`; no others are exact. Raises
    InvalidInputError for another name or kernels that are not exact, PreconditionError if the
    native ones must be taken and are not there.
    """
    try:
        chosen = KernelsName(name)
    except ValueError:
        known = ", ".join(KernelsName)
        raise InvalidInputError(f"There are no kernels called {name}; known are {known}.") from None
    if exact and chosen is KernelsName.REFERENCE:
        raise InvalidInputError(
            "The reference kernels are not exact, since torch rounds by the number of rows; leave "
            "out --exact, or --kernels reference."
        )
    if exact or chosen is KernelsName.NATIVE:
        return NativeKernels(exact=exact, activations=activations)
    if chosen is KernelsName.REFERENCE or _is_plain(manifest):
        return ReferenceKernels()
    loaded = native_library()
    if loaded.library is None:
        say(f"computing with the slow reference kernels: {loaded.reason}")
        return ReferenceKernels()
    return NativeKernels(activations=activations)


def _is_plain(manifest: Manifest) -> bool:
    return all(
        matrix.encoding is Encoding.PLAIN
        for layout in manifest.layouts
        for matrix in layout.matrices
    )

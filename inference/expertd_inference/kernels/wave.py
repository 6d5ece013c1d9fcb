"""What kernels of experts are given: routed rows, and experts that are computed at once.

One form for all of them: on the CPU the experts' records lie in the arena (:class:`Wave`), on a
device with a memory of its own in the slots of its cache (:class:`CachedWave`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd_inference.kernels.activation import Activation
from expertd_inference.kernels.arena import ArenaTensors
from expertstore.pack.manifest import GateOrder, RecordLayout


@dataclass(frozen=True)
class ExpertsSpec:
    """What all experts of a layer share: their records' layout and their activation.

    ``apply_gate`` is the model's own, [n, 2I] to [n, I]; it expects its columns in
    ``gate_order``, while records always hold gate, then up. Of experts without a gate it is from
    [n, I]. ``activation`` says what it does, if that is one of those that kernels know.
    """

    layout: RecordLayout
    gate_order: GateOrder
    apply_gate: Callable[[Tensor], Tensor]
    activation: Activation | None = None

    def activate(self, inner: Tensor) -> Tensor:
        """What enters ``down``, [n, I], from what the record's first matrix gave."""
        if self.gate_order is GateOrder.INTERLEAVED and self.layout.is_gated:
            inner = torch.stack(inner.chunk(2, dim=-1), dim=-1).flatten(-2)
        return self.apply_gate(inner)


@dataclass(frozen=True, slots=True)
class Routed:
    """Rows that enter a layer's experts, and which of these compute each row."""

    rows: Tensor
    """[T, H], floating."""
    index: Tensor
    """[T, k], integer: the experts of each row. A number past the layer's last expert means
    "none"."""
    weights: Tensor
    """[T, k], floating: by what each expert's result is multiplied."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def top_k(self) -> int:
        """How many experts compute a row."""
        return self.index.shape[1]

    def empty_slots(self) -> Tensor:
        """Zeros [T, k, H] for the weighted results, of the dtype in which they are summed."""
        rows, weights = self.rows, self.weights
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        return rows.new_zeros(*weights.shape, rows.shape[1], dtype=dtype)

    def split(self, num_rows: int) -> Iterator["Routed"]:
        """The same in parts of ``num_rows`` rows; the last may have fewer."""
        parts = (torch.split(each, num_rows) for each in (self.rows, self.index, self.weights))
        return map(Routed, *parts)


@dataclass(frozen=True, slots=True)
class Wave:
    """Experts of one layer that are computed at once, and where their records are in ``arena``."""

    experts: Sequence[int]
    records: Sequence[int]
    """Byte offsets in ``arena``, one for each of ``experts``."""
    arena: ArenaTensors
    spec: ExpertsSpec

    def only(self, experts: set[int]) -> "Wave":
        """Of these the ones that are in ``experts``."""
        pairs = [
            pair for pair in zip(self.experts, self.records, strict=True) if pair[0] in experts
        ]
        return Wave(
            [expert for expert, _ in pairs],
            [record for _, record in pairs],
            self.arena,
            self.spec,
        )


@dataclass(frozen=True, slots=True)
class CachedWave:
    """Experts of one layer whose records are in the cache of a device; all tensors lie there."""

    cache: Tensor
    """[num_slots, slot_bytes], uint8."""
    slot_of: Tensor
    """[num_experts], int32: the slot of each expert; -1 leaves the rows of that expert alone."""
    spec: ExpertsSpec
    exact: bool = False
    """Whether the bits of a row may not depend on the other rows."""

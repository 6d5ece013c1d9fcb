"""One MoE layer over records in the arena, in plain torch.

This is the definition: other kernels take the same arguments and are tested against it. It
performs the operations of transformers' default experts function on the same shapes
(``grouped_mm_experts_forward`` in ``transformers.integrations.moe``), so a pack of plain
matrices gives the same bits as the original checkpoint:

- the rows of an expert are ordered by token, then by position in the top k;
- a bias is added after the product was rounded, as its own operation;
- the weighted results of a token are kept apart, [T, k, H], and summed at once in the
  order of its top k. So the sum depends neither on the order in which experts come nor on
  how they are split into waves, and computing an expert again only writes the same again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from expertd_inference.kernels.activation import Activation
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.pack.codec import dequantize
from expertstore.pack.manifest import Encoding, GateOrder, Matrix, RecordLayout

GATE_UP = "gate_up"
DOWN = "down"


@dataclass(frozen=True)
class ExpertsSpec:
    """What all experts of a layer share: their records' layout and their activation.

    ``apply_gate`` is the model's own, [n, 2I] to [n, I]; it expects its columns in
    ``gate_order``, while records always hold gate, then up. ``activation`` says what it does,
    if that is one of those that kernels know.
    """

    layout: RecordLayout
    gate_order: GateOrder
    apply_gate: Callable[[Tensor], Tensor]
    activation: Activation | None = None


def empty_slots(hidden: Tensor, top_k_weights: Tensor) -> Tensor:
    """Zeros [T, k, H] for :func:`fill_slots`, of the dtype in which results are summed."""
    dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
    return hidden.new_zeros(*top_k_weights.shape, hidden.shape[1], dtype=dtype)


def fill_slots(
    slots: Tensor,  # [T, k, H], written to; floating
    hidden: Tensor,  # [T, H], floating
    top_k_index: Tensor,  # [T, k], integer
    top_k_weights: Tensor,  # [T, k], floating
    *,
    experts: Sequence[int],
    records: Sequence[int],
    arena: ArenaTensors,
    spec: ExpertsSpec,
) -> None:
    """Writes the weighted results of ``experts`` into their tokens' slots.

    ``records`` are the experts' byte offsets in ``arena``.
    """
    for expert, record in zip(experts, records, strict=True):
        token, position = torch.where(top_k_index == expert)  # [n] each
        gate_up = _linear(hidden[token], GATE_UP, record, arena, spec.layout)  # [n, 2I]
        if spec.gate_order is GateOrder.INTERLEAVED:
            gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
        result = _linear(spec.apply_gate(gate_up), DOWN, record, arena, spec.layout)  # [n, H]
        slots[token, position] = result * top_k_weights[token, position, None]


def sum_slots(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer's output [T, H] from its filled slots [T, k, H]."""
    return slots.sum(dim=1).to(dtype)


def linear(rows: Tensor, weight: QuantizedWeight, /) -> Tensor:
    """``rows`` [..., in] times the weight, dequantized for this call: [..., out]."""
    return functional.linear(rows, dequantize(weight.matrix, weight.parts, rows.dtype))


def _linear(
    rows: Tensor, name: str, record: int, arena: ArenaTensors, layout: RecordLayout
) -> Tensor:
    """``rows`` [n, in] times the record's matrix ``name``, with its bias: [n, out]."""
    result = functional.linear(rows, _weight(name, record, arena, layout, rows.dtype))
    for part in layout.parts:
        if part.name == f"{name}.bias":
            return result + arena.part(record, part).to(rows.dtype)
    return result


def _weight(
    name: str, record: int, arena: ArenaTensors, layout: RecordLayout, dtype: torch.dtype
) -> Tensor:
    """The matrix ``name`` of the record, [out, in], in ``dtype``; in place if it is plain."""
    matrix = _matrix(layout, name)
    if matrix.encoding is Encoding.PLAIN:
        return arena.part(record, layout.part(f"{name}.weight")).to(dtype)
    parts = {
        part.name: arena.part(record, part)
        for part in layout.parts
        if part.name.startswith(f"{name}.")
    }
    return dequantize(matrix, parts, dtype)


def _matrix(layout: RecordLayout, name: str) -> Matrix:
    for matrix in layout.matrices:
        if matrix.name == name:
            return matrix
    raise KeyError(name)

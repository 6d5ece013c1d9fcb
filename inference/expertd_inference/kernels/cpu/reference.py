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

import torch
from torch import Tensor
from torch.nn import functional

from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.wave import Routed, Wave
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.pack.codec import dequantize
from expertstore.pack.manifest import Encoding, GateOrder, Matrix, RecordLayout

GATE_UP = "gate_up"
DOWN = "down"


def fill_slots(slots: Tensor, routed: Routed, wave: Wave) -> None:
    """Writes the weighted results of the wave's experts into ``slots`` [T, k, H], floating."""
    spec, arena, index = wave.spec, wave.arena, routed.index
    for expert, record in zip(wave.experts, wave.records, strict=True):
        token, position = torch.where(index == expert)  # [n] each
        gate_up = _linear(routed.rows[token], GATE_UP, record, arena, spec.layout)  # [n, 2I]
        if spec.gate_order is GateOrder.INTERLEAVED:
            gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
        result = _linear(spec.apply_gate(gate_up), DOWN, record, arena, spec.layout)  # [n, H]
        slots[token, position] = result * routed.weights[token, position, None]


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

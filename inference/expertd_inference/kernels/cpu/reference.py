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
from expertstore.pack.layout import DOWN
from expertstore.pack.manifest import Encoding, Matrix, RecordLayout


def fill_slots(slots: Tensor, routed: Routed, wave: Wave, *, row_by_row: bool = False) -> None:
    """Writes the weighted results of the wave's experts into ``slots`` [T, k, H], floating.

    With ``row_by_row`` the bits of a row do not depend on the other rows, which torch rounds by.
    """
    spec, arena, index = wave.spec, wave.arena, routed.index
    for expert, record in zip(wave.experts, wave.records, strict=True):
        inward, down = (
            _Product(name, record, arena, spec.layout, routed.rows.dtype)
            for name in (spec.layout.inward.name, DOWN)
        )
        tokens, positions = torch.where(index == expert)  # [n] each
        num_at_once = 1 if row_by_row else max(1, len(tokens))
        pairs = zip(*(torch.split(x, num_at_once) for x in (tokens, positions)), strict=True)
        for token, position in pairs:
            inner = inward(routed.rows[token])  # [n, 2I], or without a gate [n, I]
            result = down(spec.activate(inner))  # [n, H]
            slots[token, position] = result * routed.weights[token, position, None]


def sum_slots(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer's output [T, H] from its filled slots [T, k, H]."""
    return slots.sum(dim=1).to(dtype)


def linear(rows: Tensor, weight: QuantizedWeight, /, *, row_by_row: bool = False) -> Tensor:
    """``rows`` [..., in] times the weight, dequantized for this call: [..., out].

    ``row_by_row`` is that of :func:`fill_slots`.
    """
    plain = dequantize(weight.matrix, weight.parts, rows.dtype)
    if not row_by_row:
        return functional.linear(rows, plain)
    out = rows.new_empty(*rows.shape[:-1], weight.matrix.out_features)
    flat = out.view(-1, weight.matrix.out_features)
    for number, row in enumerate(rows.reshape(-1, rows.shape[-1])):
        flat[number] = functional.linear(row.clone()[None], plain)[0]
    return out


class _Product:
    """Rows [n, in] times a record's matrix ``name``, with its bias: [n, out]."""

    def __init__(
        self, name: str, record: int, arena: ArenaTensors, layout: RecordLayout, dtype: torch.dtype
    ) -> None:
        self._weight = _weight(name, record, arena, layout, dtype)
        biases = [part for part in layout.parts if part.name == f"{name}.bias"]
        self._bias = arena.part(record, biases[0]).to(dtype) if biases else None

    def __call__(self, rows: Tensor) -> Tensor:
        result = functional.linear(rows, self._weight)
        return result if self._bias is None else result + self._bias


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

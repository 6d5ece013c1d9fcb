"""Rows of an image that see one another, as Gemma 4 has them in its windowed layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from expertd_inference.execution.batch import Span
from expertd_inference.kernels.block_order import take_keys, take_values
from expertd_inference.kernels.blocks import BLOCK_TOKENS


@dataclass(frozen=True)
class MutualRows:
    """Rows of one image in a step: the image is tokens ``begin`` to ``end`` of its sequence."""

    first: int
    """The first of these rows in the step."""
    position: int
    """Its token's place in the sequence."""
    begin: int
    end: int
    blocks: Sequence[int]

    @property
    def rows(self) -> slice:
        """In the step."""
        return slice(self.first, self.first + self.end - self.position)


def mutual_rows(spans: Sequence[Span]) -> list[MutualRows]:
    """All of these spans, one after the other."""
    found: list[MutualRows] = []
    first = 0
    for span in spans:
        last = span.position + span.num_rows
        for begin, end in () if span.seen is None else span.seen.wholes:
            position = max(begin, span.position)
            if position < min(end, last):
                if end > last:
                    raise ValueError(f"sequence {span.sequence} has a part of an image")
                row = first + position - span.position
                found.append(MutualRows(row, position, begin, end, span.blocks))
        first += span.num_rows
    return found


def attend_mutually(
    image: MutualRows,
    query: Tensor,  # [rows, heads, d_k], of the image's
    keys: Tensor,  # of a layer, as KvMemory has them, these rows' among them
    values: Tensor,
    scale: float,
    window: int,
) -> Tensor:  # [rows, heads, d_v]
    """Each row sees what is within ``window`` before it, and the whole image from there on."""
    least = max(0, image.position + 1 - window) // BLOCK_TOKENS
    number = -(-image.end // BLOCK_TOKENS)
    blocks = torch.tensor(image.blocks[least:number], device=keys.device)
    column = torch.arange(least * BLOCK_TOKENS, image.end, device=keys.device)
    row = torch.arange(image.position, image.end, device=keys.device)[:, None]
    visible = (column > row - window) & ((column <= row) | (column >= image.begin))
    seen_keys, seen_values = (
        take(part, blocks).transpose(0, 1).flatten(1, 2)[:, : len(column)]
        for take, part in ((take_keys, keys), (take_values, values))
    )
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        seen_keys[None].to(query.dtype),
        seen_values[None].to(query.dtype),
        attn_mask=visible,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)

"""The rows of a recorded step: fixed memory on a device, and attention that reads it.

A recorded step repeats what a device was asked for, on the same memory. So all that changes from
step to step (tokens, positions, tables of blocks) is copied into one tensor before it, and shapes
never change: a step has ``size`` rows, each of another sequence, whose tables have ``width``
blocks. Rows that a batch lacks are those of a sequence of one token in a block that is no
sequence's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertd_inference.execution.batch import Span
from expertd_inference.execution.layers import AttentionLayer
from expertd_inference.kernels.block_order import put_keys, put_values, take_keys, take_values
from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.kv.memory import KvMemory

_TOKEN, _POSITION, _ANGLE, _REAL, _TABLE = range(5)


class GraphRows:
    """``size`` rows with tables of ``width`` blocks; ``scratch`` is the block of missing rows."""

    def __init__(self, size: int, width: int, scratch: int, device: torch.device) -> None:
        self.size, self.width = size, width
        self._host = torch.empty(size, _TABLE + width, dtype=torch.int64)
        self._empty = torch.tensor([0, 0, 0, 0, *[scratch] * width])
        self._there = self._empty.expand(size, -1).contiguous().to(device)

    @property
    def tokens(self) -> Tensor:
        """[1, size], int64, on the device."""
        return self._there[:, _TOKEN][None]

    @property
    def positions(self) -> Tensor:
        """[size], int64: how many tokens of its sequence come before each row."""
        return self._there[:, _POSITION]

    @property
    def angles(self) -> Tensor:
        """[size], int64: the positions that angles are taken of."""
        return self._there[:, _ANGLE]

    @property
    def real(self) -> Tensor:
        """[size, 1], bool: whether the batch has such a row."""
        return self._there[:, _REAL : _REAL + 1] != 0

    @property
    def tables(self) -> Tensor:
        """[size, width], int64: the blocks of each row's sequence."""
        return self._there[:, _TABLE:]

    def fill(self, spans: Sequence[Span], to_device: Callable[[Tensor], Tensor]) -> None:
        """Puts in what a step has, at most ``size`` spans of one row; ``to_device`` copies."""
        host = self._host
        host.copy_(self._empty.expand_as(host))
        for row, span in enumerate(spans):
            num = span.position // BLOCK_TOKENS + 1
            host[row, : _TABLE + num] = torch.tensor(
                [
                    span.tokens[0],
                    span.position,
                    span.position + span.shift,
                    1,
                    *span.blocks[:num],
                ]
            )
        self._there.copy_(to_device(host))


class GraphAttention:
    """Attention of one forward pass over ``rows``, by torch's operations, of fixed shapes.

    It reads all blocks of the tables, and lets a row see its own sequence up to itself.
    """

    def __init__(
        self, layers: Mapping[nn.Module, AttentionLayer], memory: KvMemory, rows: GraphRows
    ) -> None:
        self._layers, self._memory, self._rows = layers, memory, rows
        self._place: tuple[Tensor, Tensor] | None = None
        self._visible: dict[int | None, Tensor] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # [1, heads, size, d_k]
        key: Tensor,  # [1, kv_heads, size, d_k]
        value: Tensor,  # [1, kv_heads, size, d_v]
        mask: Tensor | None,
        scaling: float | None,
        others: dict[str, Any],
    ) -> Tensor:
        """[1, size, heads, d_v]; appends ``key`` and ``value`` to the rows' blocks."""
        layer = self._layers[module]
        keys, values = self._memory.keys[layer.number], self._memory.values[layer.number]
        if layer.appends:
            block, offset = self._places()
            put_keys(keys, block, offset, key[0].transpose(0, 1))
            put_values(values, block, offset, value[0].transpose(0, 1))
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        # Heads that share keys are rows of one head.
        kv_heads, (_, heads, size, width) = keys.shape[1], query.shape
        grouped = query[0].transpose(0, 1).reshape(size, kv_heads, heads // kv_heads, width)
        attended = _attend(
            grouped,
            self._gathered(take_keys(keys, self._rows.tables.flatten())),
            self._gathered(take_values(values, self._rows.tables.flatten())),
            self._sees(layer.window),
            scale,
            others.get("s_aux"),
            others.get("softcap"),
        )
        return attended.flatten(1, 2)[None]

    def mask(
        self,
        make: Callable[..., Tensor | None],
        arguments: dict[str, Any],
    ) -> None:
        """None: no row sees another sequence's."""

    def _places(self) -> tuple[Tensor, Tensor]:
        """The block of each row, and its place there, [size] each; worked out once a step."""
        if self._place is None:
            rows = self._rows
            number = (rows.positions // BLOCK_TOKENS)[:, None]
            block = rows.tables.gather(1, number)[:, 0]
            self._place = block, rows.positions % BLOCK_TOKENS
        return self._place

    def _sees(self, window: int | None) -> Tensor:  # [size, 1, 1, width * BLOCK_TOKENS], bool
        visible = self._visible.get(window)
        if visible is None:
            last = self._rows.positions[:, None, None, None]
            token = torch.arange(self._rows.width * BLOCK_TOKENS, device=last.device)
            visible = token <= last
            if window is not None:
                visible = visible & (token > last - window)
            self._visible[window] = visible
        return visible

    def _gathered(self, found: Tensor) -> Tensor:  # [size, kv_heads, tokens, d]
        """Of the blocks of all rows' tables; 0 past a row, where others may have left NaN."""
        found = found.unflatten(0, (self._rows.size, self._rows.width))  # type: ignore[no-untyped-call]
        found = found.transpose(1, 2).flatten(2, 3)
        return found.masked_fill(~self._sees(None).transpose(2, 3), 0)


def _attend(
    query: Tensor,  # [size, kv_heads, heads / kv_heads, d_k]
    keys: Tensor,  # [size, kv_heads, tokens, d_k]
    values: Tensor,  # [size, kv_heads, tokens, d_v]
    visible: Tensor,  # [size, 1, 1, tokens], bool
    scale: float,
    sinks: Tensor | None,  # [heads]
    softcap: float | None,
) -> Tensor:  # [size, kv_heads, heads / kv_heads, d_v]
    if sinks is None and not softcap:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=scale
        )
    scores = (query.float() @ keys.float().transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        shape = (len(query), query.shape[1], query.shape[2], 1)
        aside = sinks.float().view(1, query.shape[1], query.shape[2], 1).expand(shape)
        scores = torch.cat((scores, aside), dim=-1)
    shares = scores.softmax(-1)[..., : keys.shape[2]]
    return (shares @ values.float()).to(query.dtype)

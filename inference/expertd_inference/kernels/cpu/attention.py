"""Attention of a batch of sequences, whose keys and values lie in blocks.

Each row's key and value is appended to its sequence's blocks; then it attends to its sequence up
to itself. Heads that share keys are computed together over one reading of them. Scores are float32,
and so are their powers, except where the processor multiplies powers as bfloat16. The bits of a
row depend on its own sequence only, not on the other rows, on how a prompt was divided, or on
threads.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from expertd_inference.kernels.block_order import put_keys, put_values, take_keys, take_values
from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.kernels.cpu.library import TYPES, check_memory, native_library
from expertd_inference.kernels.cpu.structures import AttentionCall, NativeAttentionPlan


class AttentionSpan(NamedTuple):
    """Consecutive rows of one sequence."""

    position: int
    """Of the first row: so many tokens of the sequence are in its blocks already."""
    num_rows: int
    blocks: Sequence[int]
    """The sequence's table: enough for ``position + num_rows`` tokens."""


class AttentionPlan:
    """The spans of a batch as native code reads them: built once a step, for all layers.

    Raises ValueError for no spans, a span without rows, or a table too short for it.
    """

    def __init__(self, spans: Sequence[AttentionSpan]) -> None:
        self.spans = [AttentionSpan(*span) for span in spans]
        if not self.spans:
            raise ValueError("there are no spans")
        positions, first_rows, first_blocks, blocks = [], [0], [], list[int]()
        for position, num_rows, table in self.spans:
            if position < 0 or num_rows < 1:
                raise ValueError(f"{num_rows} rows from position {position} are no span")
            needed = -(-(position + num_rows) // BLOCK_TOKENS)
            if len(table) < needed:
                raise ValueError(f"{needed} blocks are needed, and the table has {len(table)}")
            positions.append(position)
            first_rows.append(first_rows[-1] + num_rows)
            first_blocks.append(len(blocks))
            blocks += table[:needed]
        self.num_rows = first_rows[-1]
        self.most_block = max(blocks)
        if min(blocks) < 0:
            raise ValueError("a table has a block of a negative number")
        numbers = [*positions, *first_rows, *first_blocks]
        self._numbers = (c_int64 * len(numbers))(*numbers)
        self._blocks = (c_int32 * len(blocks))(*blocks)
        count, address = len(self.spans), ctypes.addressof(self._numbers)
        self._plan = NativeAttentionPlan(
            address,
            address + 8 * count,
            address + 8 * (2 * count + 1),
            ctypes.addressof(self._blocks),
            count,
        )
        self.address = ctypes.addressof(self._plan)
        """Of the C structure, which is there as long as this object."""


def attend(
    plan: AttentionPlan,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Appends the plan's rows to their blocks, then each attends to its sequence up to itself.

    Args:
        plan: The rows' sequences.
        keys: A layer's blocks: [num_blocks, kv_heads, 64, key_width], without gaps; written to.
            In which order, :mod:`..block_order` says.
        values: The same of values: [num_blocks, kv_heads, 64, value_width].
        query: [rows, heads, key_width]; rows and heads may lie anywhere, a head has no gaps. All
            tensors are of its dtype: bfloat16, float16 or float32.
        key: [rows, kv_heads, key_width]; None with ``value``: nothing is appended.
        value: [rows, kv_heads, value_width].
        scale: What scores are multiplied by.
        window: A row sees so many last tokens, itself among them; None: all.
        sinks: [heads], of any floating dtype: a score that takes its share and has no value.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        out: [rows, heads, value_width], without gaps: where the result goes.

    Returns:
        [rows, heads, value_width].

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together.
        MemoryError: There is none for intermediate results.
    """
    _check(plan, keys, values, query, key, value, window, sinks)
    rows, heads, _ = query.shape
    if out is None:
        out = query.new_empty(rows, heads, values.shape[3])
    library = native_library().library
    if library is None or not query.is_cpu:
        append(plan, keys, values, key, value)
        return out.copy_(
            attend_slowly(
                *(plan, keys, values, query, scale),
                window=window,
                sinks=sinks,
                softcap=softcap,
            )
        )
    if sinks is not None:
        sinks = sinks.float().contiguous()
    key_strides = (0, 0) if key is None else key.stride()[:2]
    value_strides = (0, 0) if value is None else value.stride()[:2]
    call = AttentionCall(
        plan.address,
        query.data_ptr(),
        None if key is None else key.data_ptr(),
        None if value is None else value.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        heads,
        keys.shape[1],
        keys.shape[3],
        values.shape[3],
        *query.stride()[:2],
        *key_strides,
        *value_strides,
        *out.stride()[:2],
        window or 0,
        scale,
        softcap or 0.0,
        TYPES[query.dtype],
        torch.get_num_threads(),
    )
    check_memory(library.expertd_attend_rows(ctypes.addressof(call)))
    return out


def _check(
    plan: AttentionPlan,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    num_blocks, kv_heads, _, key_width = keys.shape
    rows, heads, width = query.shape
    expected = (num_blocks, kv_heads, BLOCK_TOKENS)
    if keys.shape[:3] != expected or values.shape[:3] != expected or plan.most_block >= num_blocks:
        raise ValueError(f"blocks of {keys.shape} and {values.shape} do not fit the plan")
    if rows != plan.num_rows or width != key_width or heads % kv_heads:
        raise ValueError(f"queries of {query.shape} do not fit keys of {keys.shape}")
    if (key is None) != (value is None):
        raise ValueError("keys are appended with values, or neither")
    tensors = [keys, values, query]
    if key is not None and value is not None:
        if key.shape != (rows, kv_heads, width) or value.shape != (rows, kv_heads, values.shape[3]):
            raise ValueError(f"keys of {key.shape} and values of {value.shape} do not fit blocks")
        tensors += [key, value]
    if any(t.dtype != query.dtype or t.device != query.device for t in tensors):
        raise ValueError("the tensors are of several dtypes or devices")
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("the blocks have gaps")
    if any(t.stride(2) != 1 for t in tensors[2:]):
        raise ValueError("a head of queries, keys or values has gaps")
    if query.dtype not in TYPES or width % 2 or values.shape[3] % 2:
        raise ValueError(f"heads of {width} and {values.shape[3]} {query.dtype} are not known")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} shows a row not even itself")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks of {sinks.shape} do not fit {heads} heads")


def append(
    plan: AttentionPlan,
    keys: Tensor,
    values: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> None:
    """Copies the rows to their blocks, on any device; arguments as of :func:`attend`."""
    if key is None or value is None:
        return
    blocks, offsets = list[int](), list[int]()
    for position, num_rows, table in plan.spans:
        for token in range(position, position + num_rows):
            blocks.append(table[token // BLOCK_TOKENS])
            offsets.append(token % BLOCK_TOKENS)
    block, offset = (torch.tensor(numbers, device=keys.device) for numbers in (blocks, offsets))
    put_keys(keys, block, offset, key)
    put_values(values, block, offset, value)


def attend_slowly(
    plan: AttentionPlan,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As :func:`attend`, of rows that were appended, by torch's operations, on any device."""
    results, first = [], 0
    group = query.shape[1] // keys.shape[1]
    for position, num_rows, table in plan.spans:
        length = position + num_rows
        needed = torch.tensor(table[: -(-length // BLOCK_TOKENS)], device=keys.device)

        def gathered(blocks: Tensor, length: int = length) -> Tensor:
            tokens = blocks.transpose(0, 1).flatten(1, 2)[:, :length]
            return tokens.float().repeat_interleave(group, 0)  # [heads, length, width]

        rows = query[first : first + num_rows].transpose(0, 1).float()
        scores = rows @ gathered(take_keys(keys, needed)).transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        token = torch.arange(length, device=keys.device)
        row = torch.arange(position, length, device=keys.device)[:, None]
        hidden = token > row
        if window:
            hidden |= token <= row - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.float()[:, None, None].expand(-1, num_rows, 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., :length]
        results.append((weights @ gathered(take_values(values, needed))).transpose(0, 1))
        first += num_rows
    return torch.cat(results).to(query.dtype)

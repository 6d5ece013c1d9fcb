"""What a program is told about a step: its rows, and where keys and values are."""

import ctypes

import numpy
import torch

from expertd_inference.execution.assembly import Assembly
from expertd_inference.execution.batch import Batch, Wanted
from expertd_inference.fewer_experts import ALL_EXPERTS
from expertd_inference.kernels.cpu.attention import AttentionPlan, AttentionSpan
from expertd_inference.kernels.cpu.operations import StepCall
from expertd_inference.kv.memory import KvMemory


def use_memory(assembly: Assembly, memory: KvMemory) -> None:
    """Lets the attention of ``assembly`` append to ``memory``, layer by layer."""
    for call, keys, values in zip(assembly.attention, memory.keys, memory.values, strict=True):
        call.keys, call.values = keys.data_ptr(), values.data_ptr()


class StepRows:
    """What native code is told about the rows of a step."""

    def __init__(self, max_rows: int, flags: int = 0) -> None:
        self._numbers = numpy.empty((5, max_rows), dtype=numpy.int64)
        self._tokens, self._positions, self._wanted, self._most, self._kept = self._numbers
        self._least_share = numpy.empty(max_rows, dtype=numpy.float32)
        self._plan: AttentionPlan | None = None
        self.step = StepCall(flags=flags)
        self.step.tokens, self.step.positions = (row.ctypes.data for row in self._numbers[:2])
        self.address = ctypes.addressof(self.step)
        self.num_positions = 0
        """One more than the last position."""

    def fill(self, batch: Batch, num_tokens: int) -> int:
        """Puts in the rows of ``batch``, and returns how many logits are wanted.

        Raises IndexError for what is none of ``num_tokens`` tokens.
        """
        first, wanted, last_position = 0, 0, 0
        for span in batch.spans:
            num, position = len(span.tokens), span.position + span.shift
            end = first + num
            if num == 1:
                self._tokens[first] = span.tokens[0]
                self._positions[first] = position
            else:
                self._tokens[first:end] = span.tokens
                self._positions[first:end] = range(position, position + num)
            last_position = max(last_position, position + num)
            if span.wanted is Wanted.LAST:
                self._wanted[wanted] = end - 1
                wanted += 1
            elif span.wanted is Wanted.ALL:
                self._wanted[wanted : wanted + num] = range(first, end)
                wanted += num
            first = end
        tokens = self._tokens[:first]
        if first and not (tokens.min() >= 0 and tokens.max() < num_tokens):
            wrong = next(int(x) for x in tokens if not 0 <= x < num_tokens)
            raise IndexError(f"token {wrong} is none of {num_tokens}")
        self._plan = AttentionPlan(
            [AttentionSpan(span.position, len(span.tokens), span.blocks) for span in batch.spans]
        )
        self._keep_fewer(batch)
        step = self.step
        step.rows, step.plan = first, self._plan.address
        step.threads = torch.get_num_threads()
        self.num_positions = last_position
        self.want(0, wanted)
        return wanted

    @property
    def num_kept(self) -> int:
        """The experts that computed the rows of the last step, if some row kept fewer."""
        return int(self._kept[: self.step.rows].sum())

    def _keep_fewer(self, batch: Batch) -> None:
        step = self.step
        if all(span.fewer is None for span in batch.spans):
            step.most_experts = step.least_share = step.kept = None
            return
        first = 0
        for span in batch.spans:
            fewer, rows = span.fewer or ALL_EXPERTS, slice(first, first + span.num_rows)
            self._most[rows], self._least_share[rows] = fewer.most, fewer.least_share
            first += span.num_rows
        self._kept[:first] = 0
        step.most_experts, step.kept = self._most.ctypes.data, self._kept.ctypes.data
        step.least_share = self._least_share.ctypes.data

    def want(self, first: int, num: int) -> int:
        """Of the wanted rows those from ``first`` on; returns ``num``."""
        self.step.wanted = self._wanted[first:].ctypes.data
        self.step.num_wanted = num
        return num

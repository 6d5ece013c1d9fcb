"""A model of plain values: its logits depend on every token of a sequence, and on nothing else.

It keeps the tokens in KV blocks as an executor keeps keys and values, so a block that is shared,
dropped or overwritten wrongly changes the text.
"""

import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from expertd_inference.execution.batch import Batch, Wanted
from expertd_inference.execution.room import Room
from expertd_inference.experts.keeping import ExpertTally
from expertd_inference.kv.pool import BLOCK_TOKENS
from expertd_testing.tiny_models import VOCAB, byte_tokenizer

END = VOCAB - 1
"""The end-of-text token."""


def logits_of(tokens: Sequence[int]) -> Tensor:
    """Float32 [VOCAB], after these tokens."""
    seed = zlib.crc32(array("I", tokens).tobytes())
    return torch.from_numpy(np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 2)


class ToyExecutor:
    """Raises the next of ``faults`` once it has written a step's tokens."""

    name = "toy"
    turning_point: int | None = None
    reason = "a test asked for it"

    def __init__(
        self, room: Room, *, shares_prefixes: bool = True, recurrent: bool = False
    ) -> None:
        self.room = room
        self.tally = ExpertTally()
        self.shares_prefixes = shares_prefixes
        self.recurrent = recurrent
        self.blocks: list[list[int | None]] = [[None] * BLOCK_TOKENS] * room.num_blocks
        self.states: dict[int, list[int]] = {}
        self.faults: list[BaseException] = []
        self.before: Callable[[Batch], object] = lambda _: None
        self.num_rows: list[int] = []
        self.closed = False
        self.max_spans = 1000

    def fits(self, batch: Batch) -> bool:
        """Up to so many spans."""
        return len(batch.spans) <= self.max_spans

    def forward(self, batch: Batch) -> Tensor:
        """As an executor's."""
        assert not self.closed
        in_turns = not self.shares_prefixes and not self.recurrent
        assert in_turns or batch.num_rows <= self.room.num_rows
        self.before(batch)
        self.num_rows.append(batch.num_rows)
        rows = [row for span in batch.spans for row in self._rows(span)]
        if self.faults:
            raise self.faults.pop(0)
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def _rows(self, span: Any) -> list[Tensor]:
        for position, token in enumerate(span.tokens, start=span.position):
            block = span.blocks[position // BLOCK_TOKENS]
            filled = list(self.blocks[block])
            filled[position % BLOCK_TOKENS] = token
            self.blocks[block] = filled
        end = span.position + span.num_rows
        flat = [token for block in span.blocks for token in self.blocks[block]][:end]
        assert None not in flat
        known: list[int] = flat  # type: ignore[assignment]
        if span.wanted is Wanted.NONE:
            return []
        first = end if span.wanted is Wanted.LAST else span.position + 1
        return [logits_of(known[:length]) for length in range(first, end + 1)]

    def copy_block(self, source: int, target: int) -> None:
        """As an executor's."""
        self.blocks[target] = self.blocks[source]

    def close(self) -> None:
        """No step may come afterwards."""
        self.closed = True


class ToyWorker:
    """What an engine needs of a worker."""

    context_tokens: int | None = 512
    vocabulary = VOCAB
    experts_per_token = (2, 2)
    adapters: Any = None
    kv_bytes_per_token = 1000
    kv_bytes = 1 << 40

    def __init__(self, **kind: bool) -> None:
        self.tokenizer = _tokenizer()
        self.generation_config = GenerationConfig(eos_token_id=END)
        self.executor: ToyExecutor
        self.native_rows: Mapping[str, int | None] = {"a form": 32}
        self.closing: list[Callable[[], None]] = []
        self._kind = kind

    def encode(self, prompt: str) -> list[int]:
        """A token a byte."""
        ids: list[int] = self.tokenizer(prompt).input_ids
        return ids

    def expect(self, tokens: Sequence[int]) -> None:
        """It has no tables."""

    def open_executor(self, room: Room) -> ToyExecutor:
        """It is kept, for the test."""
        self.executor = ToyExecutor(room, **self._kind)
        return self.executor

    def before_close(self, call: Callable[[], None]) -> Callable[[], object]:
        """As a worker's, of one engine."""
        self.closing = [call]
        return self.closing.clear

    def close(self) -> None:
        """As a worker's."""
        for call in [*self.closing]:
            call()


@lru_cache
def _tokenizer() -> Any:
    return byte_tokenizer()

"""Sequences that go on by an executor's steps, as an engine has them."""

from collections.abc import Sequence

from torch import Tensor

from expertd_inference.device.transaction import StepLostError
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room

ROOM = Room(num_blocks=12, num_sequences=4, num_rows=512)


def repeated(executor: Executor, batch: Batch) -> Tensor:
    """The logits; a step that is lost is repeated, by the same batch."""
    while True:
        try:
            return executor.forward(batch)
        except StepLostError:
            continue


def greedy_by(
    executor: Executor, prompt: Sequence[int], num_tokens: int, blocks: Sequence[int] = (0, 1)
) -> list[int]:
    """The likeliest tokens after ``prompt``, a step for each."""
    text = list(prompt)
    for _ in range(num_tokens):
        new = text if len(text) == len(prompt) else text[-1:]
        span = Span(0, new, len(text) - len(new), blocks, None, Wanted.LAST)
        text.append(int(repeated(executor, Batch((span,))).argmax()))
    return text[len(prompt) :]

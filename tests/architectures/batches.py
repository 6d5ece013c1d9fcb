"""Whether sequences computed together are what each is alone, in float32, for any architecture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_testing.tiny_models import randomize
from tests.architectures.tiny_configs import tiny_config
from tests.inference.greedy import prompt_of

ROOM = Room(num_blocks=12, num_sequences=4, num_rows=256)
WINDOW = 8
"""Of attention, where an architecture has windows: texts here are longer."""


def batched_model(model_type: str, **settings: Any) -> Any:
    """A tiny random one, in float32."""
    config = tiny_config(model_type)
    if getattr(config, "sliding_window", None):
        settings = {"sliding_window": WINDOW} | settings
    config = tiny_config(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed=0)
    return model


@torch.no_grad()
def alone(model: Any, text: Sequence[int]) -> Tensor:
    """[T, vocabulary], by the model as it is."""
    logits: Tensor = model(torch.tensor([text])).logits[0]
    return logits


def chosen(model: Any, room: Room = ROOM) -> Executor:
    """The executor of ``model``; that sequences are computed in turns is said."""
    said: list[str] = []
    executor = choose_for(model, room, said.append)
    assert (executor.name == "turns") == bool(said)
    return executor


class Texts:
    """Sequences that are computed bit by bit, with their blocks and states."""

    def __init__(self, executor: Executor, texts: Sequence[Sequence[int]]) -> None:
        self.executor = executor
        self.texts = texts
        self.logits: list[Tensor] = [torch.empty(0)] * len(texts)
        self._positions = [0] * len(texts)
        # Tables that are neither in order nor next to each other.
        free = list(range(ROOM.num_blocks))[::-1]
        self._blocks = [free[n :: len(texts)] for n in range(len(texts))]

    def spans(self, rows: dict[int, int], wanted: Wanted = Wanted.ALL) -> list[Span]:
        """``rows`` says how many more of which text, in which order."""
        return [
            Span(
                100 + n,
                self.texts[n][self._positions[n] : self._positions[n] + num],
                self._positions[n],
                self._blocks[n],
                n,
                wanted,
            )
            for n, num in rows.items()
        ]

    def step(self, rows: dict[int, int], *, counted: bool = True) -> None:
        """Computes them, at once if the executor takes them so.

        Unless they are ``counted`` they are computed again by the next step.
        """
        spans = self.spans(rows)
        whole = Batch(tuple(spans))
        for batch in [whole] if self.executor.fits(whole) else [Batch((span,)) for span in spans]:
            counts = [span.num_rows for span in batch.spans]
            parts = torch.split(self.executor.forward(batch), counts)
            for span, part in zip(batch.spans, parts, strict=True):
                if not counted:
                    continue
                n = span.sequence - 100
                self._positions[n] += span.num_rows
                self.logits[n] = (
                    torch.cat((self.logits[n], part)) if span.position else part.clone()
                )


def compare(model: Any) -> tuple[Executor, bool]:
    """Prompts of several lengths, one in chunks beside decoding, then three steps of all.

    The executor, and whether its logits are those of each text alone.
    """
    prompts = [prompt_of(length, seed=length) for length in (19, 75, 30)]
    expected = [alone(model, prompt) for prompt in prompts]
    executor = chosen(model)
    texts = Texts(executor, prompts)
    texts.step({0: 16, 2: 20})
    texts.step({1: 65, 2: 1})  # more than a block
    texts.step({2: 6, 1: 7})
    for _ in range(3):
        texts.step({1: 1, 0: 1, 2: 1})
    return executor, all(
        # The order of sums in float32, through a few layers.
        float((ours - theirs).norm() / theirs.norm()) < 2e-5
        and torch.equal(ours.argmax(-1), theirs.argmax(-1))
        for ours, theirs in zip(texts.logits, expected, strict=True)
    )

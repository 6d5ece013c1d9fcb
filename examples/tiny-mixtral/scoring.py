"""How well a model predicts a text: in windows, each position from at least half a context."""

# ruff: noqa: ANN401 - transformers is not typed

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import corpus
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Every position but the first window's is predicted from at least half a context before it.
STRIDE_SHARE = 0.5

Tokens = npt.NDArray[np.int64]


def heldout_tokens() -> Tokens:
    """The held-out text as the model is to read it, a separator before each file."""
    return corpus.encode_modules(corpus.load_tokenizer(), corpus.read_heldout()).astype(np.int64)


@dataclass(frozen=True)
class Window:
    """A piece of a text; what an earlier window has scored is there to predict the rest from."""

    ids: Tensor  # [T], int64
    targets: Tensor  # [fresh], int64

    @property
    def fresh(self) -> slice:
        """The positions that this window is the first to score."""
        return slice(len(self.ids) - len(self.targets), None)

    def nats(self, head: Any, hidden: Tensor) -> float:
        """Of its targets in sum, by ``head`` of what the model makes of ``ids``, [T, hidden]."""
        logits = head(hidden[self.fresh]).float()
        return float(torch.nn.functional.cross_entropy(logits, self.targets, reduction="sum"))


def windows(tokens: Tokens, context: int) -> Iterator[Window]:
    """Windows of ``context`` tokens which together score each token but the first once."""
    last, scored = len(tokens) - 1, 0
    for start in range(0, last, int(context * STRIDE_SHARE)):
        end = min(start + context, last)
        ids = torch.from_numpy(tokens[start : end + 1])
        yield Window(ids[:-1], ids[1 + scored - start :])
        scored = end
        if end == last:
            return

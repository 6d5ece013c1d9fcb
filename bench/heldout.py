"""The example model, and how well it, or what was made of it, predicts text that it never saw."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/tiny-mixtral"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Heldout:
    """The first windows of the held-out text."""

    windows: Sequence[Any]
    """Of the example's own ``scoring.Window``."""
    num_tokens: int
    """That are scored, of ``num_all``."""
    num_all: int

    def nats(
        self, model: "PreTrainedModel", tick: Callable[[int], None] = lambda _: None
    ) -> npt.NDArray[np.float64]:
        """What each window costs ``model``, in nats; ``tick`` hears how many are done."""
        nats = []
        with torch.inference_mode():
            for number, window in enumerate(self.windows):
                tick(number)
                hidden = model.model(window.ids[None], use_cache=False).last_hidden_state[0]
                nats.append(window.nats(model.lm_head, hidden))
        return np.array(nats)

    def perplexity(self, nats: npt.NDArray[np.float64]) -> float:
        """Per token."""
        return float(np.exp(nats.sum() / self.num_tokens))

    def resampled(self, nats: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The perplexity of as many windows drawn with replacement, many times over.

        Every model is scored on the same draws, so that their ratios have a spread of their own.
        """
        tokens = np.array([len(window.targets) for window in self.windows])
        draws = np.random.default_rng(0).integers(len(tokens), size=(_RESAMPLES, len(tokens)))
        sampled: npt.NDArray[np.float64] = np.exp(nats[draws].sum(1) / tokens[draws].sum(1))
        return sampled


def read_heldout(context: int, most: int | None = None) -> Heldout:
    """The first ``most`` windows of ``context`` tokens, or all."""
    scoring = example_module("scoring")
    tokens = scoring.heldout_tokens()
    windows = list(scoring.windows(tokens, context))[:most]
    return Heldout(windows, sum(len(window.targets) for window in windows), len(tokens) - 1)


def example_module(name: str) -> ModuleType:
    """A module of the example model's folder, whose scripts import one another by their names."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLE))

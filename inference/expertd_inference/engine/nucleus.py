"""Which tokens may be drawn and how likely each is: temperature, top-k, top-p and min-p of one row.

The order and the bounds are those of transformers' warpers, without a sort of the vocabulary: only
the tokens within a distance of the likeliest are sorted, and if those are too few to say which
tokens remain, more are. Where many are near, a histogram of the weights says how far top-p goes.
Score and token are sorted as one integer, in half the time of a stable sort of the scores and in
the same order.
"""

from dataclasses import dataclass
from math import inf, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]

_DISTANCES: tuple[float, ...] = (8.0, 16.0, inf)
"""How far below the likeliest, in units of the scaled scores, tokens are looked at."""

_MANY = 8192
"""From so many tokens within the first distance on a histogram costs less than their sort."""

_BINS, _BIN = 256, 1 / 16
"""So many distances are tried for a nucleus, each so much further than the one before."""


_COLDEST = 1e-30
"""A float32 that can be divided by."""


_PART = 2048
"""The weights that are added up at once."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that may be drawn, ``tokens`` [n], and ``weights`` [n] like their probabilities.

    ``tokens`` is None where all of the vocabulary may be, in its order; else the likeliest is
    first, and of equals the first of the vocabulary.
    """

    tokens: NDArray[np.int64] | None
    weights: NDArray[np.float32]

    def draw(self, uniform: float) -> int:
        """The token at ``uniform``, from 0 to below 1, of all weights one after another."""
        # In two steps: which part, and which of its tokens. Each sum has one order.
        parts = [self.weights[at : at + _PART] for at in range(0, len(self.weights), _PART)]
        sums = np.array([part.sum() for part in parts], np.float64)
        part, rest = _place(sums, uniform * float(sums.sum()))
        index, _ = _place(parts[part], rest)
        index += part * _PART
        return index if self.tokens is None else int(self.tokens[index])


def _place(weights: NDArray[Any], target: float) -> tuple[int, float]:
    """Where the sum from the beginning exceeds ``target``, and how much of it is left there."""
    ends = np.cumsum(weights, dtype=np.float64)
    # Rounding may lead past the end; then it is the last that may be drawn at all.
    last = int(np.flatnonzero(weights)[-1])
    index = min(int(np.searchsorted(ends, target, side="right")), last)
    return index, target - (float(ends[index - 1]) if index else 0.0)


def candidates(
    scores: Scores,  # [vocabulary], the largest finite
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Candidates:
    """What remains of ``scores`` at a ``temperature`` above 0; a ``top_k`` of 0 is none."""
    with np.errstate(over="ignore"):  # as good as none at a temperature of next to nothing
        below = (scores - scores.max()) / np.float32(max(temperature, _COLDEST))
    if top_k >= len(scores):
        top_k = 0
    if not top_k and top_p >= 1 and min_p <= 0:
        return Candidates(None, np.exp(below))
    total, distances = 0.0, _DISTANCES
    if not top_k and top_p < 1:
        all_weights = np.exp(below)
        # The sum over all is needed where the nucleus is one of all.
        total = float(all_weights.sum(dtype=np.float64))
        if np.count_nonzero(below >= -_DISTANCES[0]) >= _MANY:
            distances = (_distance_of(below, all_weights, top_p * total), inf)
    elif not top_k:
        distances = (-log(min_p) + 1e-3,)
    for distance in distances:
        tokens = np.flatnonzero(below >= -distance)
        if len(tokens) < top_k and distance < inf:
            continue
        if top_k:
            # Those that equal the last of them remain as well.
            near = below[tokens]
            tokens = tokens[near >= np.partition(near, -top_k)[-top_k]]
        tokens, ordered = _descending(below, tokens)
        weights = np.exp(ordered)
        if top_p < 1:
            ends = np.cumsum(weights, dtype=np.float64)
            ends /= total or ends[-1]
            if ends[-1] < top_p and distance < inf:
                continue
            # A token remains if those before it are not enough; the first always does.
            weights = weights[: 1 + int(np.count_nonzero(ends[:-1] < top_p))]
        break
    if min_p > 0:
        weights = weights[: max(1, int(np.count_nonzero(weights >= min_p * weights[0])))]
    return Candidates(tokens[: len(weights)], weights)


def _distance_of(below: Scores, weights: NDArray[np.float32], mass: float) -> float:
    """A distance within which the weights come to ``mass``, rounding apart."""
    bins = np.minimum(below * np.float32(-1 / _BIN), _BINS).astype(np.intp)
    sums = np.cumsum(np.bincount(bins, weights, minlength=_BINS + 1))
    last = int(np.searchsorted(sums, mass * (1 + 1e-9)))
    return (last + 1) * _BIN if last < _BINS else inf


def _descending(below: Scores, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], Scores]:
    """``tokens`` and their scores, none above 0, the largest first; of equals the first token."""
    # Without a sign floats have the order of their bits.
    bits = np.abs(below[tokens]).view(np.uint32).astype(np.uint64)
    keys = (bits << np.uint64(32)) | tokens.astype(np.uint64)
    keys.sort()
    ordered = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return ordered, below[ordered]

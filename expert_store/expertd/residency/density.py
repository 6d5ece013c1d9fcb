"""Hit density: how likely an expert is used when its layer comes next, by how soon that is.

**How likely** is learned while serving. Each expert has running averages of its use over the
last 1, 4, 16 ... visits of its layer; a linear model shared by all experts of the model, fitted
by recursive least squares, tells how much each average says about the next visit. Each token
gives a sample per expert of the model, thousands, for a handful of weights: they are known
after a few tokens, and follow when routing changes its character. No weight is negative, so
that an access never makes an expert worth less.

**How soon** follows from the cycle of layers. A record just used by the only worker cannot be
needed before all other layers had their turn; one of the next layers is needed at once. The
value is the expected hits of a record's next two visits over the time until the second:
hits per time of residency are what Beckmann et al. rank by (LHD, NSDI 2018), here with ages
counted in visits and the time to the next visit known rather than learned. Two visits, since
after one alone the few layers ahead would be worth many times the rest, and that bet is lost
wherever the layer ahead is being visited already (what it uses is told afterwards).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertd.policy_names import PolicyName
from expertd.residency.policy import Entries, Policy, Values

HALF_LIVES = 4.0 ** np.arange(5)
"""In visits of the layer: from the shortest there is to a few answers' length, or a few tokens'
each of many workers. The fit weighs them; a denser or longer series measures the same."""

MEMORY_TOKENS = float(HALF_LIVES[-1])
"""Half-life of what the fit has seen: as far back as its averages look."""

_STALE_TURNS = 4
"""A stream that let this many turns go by stands still, and is expected nowhere."""


class _Position(NamedTuple):
    """Where a stream is: the layer it visited last, whether as the one before, and when."""

    layer: int
    stays: bool
    touches: int


class Density(Policy):
    """Evicts what promises the fewest hits for the time that it takes to get them."""

    name = PolicyName.DENSITY

    def __init__(self, num_experts: Sequence[int], experts_per_token: Sequence[int]) -> None:
        super().__init__(num_experts, experts_per_token)
        self._num_layers, self._width = len(num_experts), max(num_experts)
        self._per_token = np.array(experts_per_token, np.float64)
        first = np.cumsum([0, *num_experts])[:-1]
        self._cell = self._layer_of * self._width + np.arange(self.num_entries)
        self._cell -= first[self._layer_of]
        # Layers of fewer experts are padded with features of 0, from which nothing is learned.
        num_features = len(HALF_LIVES) + 1
        self._features: npt.NDArray[np.float32] = np.zeros(
            (self._num_layers, self._width, num_features), np.float32
        )
        # The last feature is what is known without history: all experts alike.
        for layer, (num, used) in enumerate(zip(num_experts, experts_per_token, strict=True)):
            self._features[layer, :num, -1] = used / num
        self._decay = np.exp2(-1 / HALF_LIVES)
        # Before it has learned: the mean of all averages, worth one sample.
        self._prior = np.full(num_features, 1 / len(HALF_LIVES))
        self._prior[-1] = 0
        self._weights = self._prior
        self._weights_at = 0
        self._squares: npt.NDArray[np.float64] = np.zeros((num_features, num_features))
        self._products: npt.NDArray[np.float64] = np.zeros(num_features)
        self._streams: dict[int, _Position] = {}

    def leave(self, stream: int) -> None:
        """A stream has ended: nothing is expected of it."""
        self._streams.pop(stream, None)

    def of(self, entries: Entries) -> Values:
        """Expected hits per token of residency."""
        self._fit()
        features = self._features.reshape(-1, len(self._weights))[self._cell[entries]]
        # Two visits, the second a token after the first.
        per_hit = 2 * self._activity / (1 + self._tokens_to_visit())
        value: Values = features @ self._weights * per_hit[self._layer_of[entries]]
        return value

    def _use(self, entries: Entries, stream: int, tokens: float) -> None:
        layers = self._layer_of[entries]
        starts = np.flatnonzero(np.diff(layers, prepend=-1))
        visited = layers[starts]
        lengths = np.diff(starts, append=len(entries))
        visit = np.repeat(np.arange(len(visited)), lengths)
        fade = float(0.5 ** (tokens / MEMORY_TOKENS))
        self._squares *= fade
        self._products *= fade
        # All visits at once, as far as they are of different layers.
        rounds = _occurrences(visited)
        columns = self._cell[entries] - layers * self._width
        for number in range(rounds.max() + 1):
            chosen = rounds == number
            row = np.cumsum(chosen) - 1
            taken = chosen[visit]
            cells = row[visit[taken]] * self._width + columns[taken]
            counts = np.bincount(cells, minlength=int(row[-1] + 1) * self._width)
            self._learn(visited[chosen], counts.reshape(-1, self._width), lengths[chosen])
        before = self._streams.get(stream)
        # Some workers take a prompt through each layer token by token.
        stays = before is not None and len(visited) == 1 and before.layer == int(visited[0])
        self._streams[stream] = _Position(int(visited[-1]), stays, self._num_touches)

    def _learn(
        self,
        layers: npt.NDArray[np.int64],  # [V], each once
        counts: npt.NDArray[np.int64],  # [V, width]
        lengths: npt.NDArray[np.int64],  # [V], touches
    ) -> None:
        """One visit of each of ``layers``: of one token, or of many (a prompt)."""
        # A prompt's accesses come merged; they are those of at least so many tokens.
        tokens = np.maximum(1.0, lengths / self._per_token[layers])
        used = (counts / tokens[:, None]).astype(np.float32)
        features = self._features[layers]
        flat = features.reshape(-1, features.shape[2])
        share = (1 / tokens).astype(np.float32)
        weighted = (features * share[:, None, None]).reshape(flat.shape)
        self._squares += weighted.T @ flat
        self._products += weighted.T @ used.reshape(-1)
        keep = (self._decay ** tokens[:, None]).astype(np.float32)[:, None, :]
        averages = features[:, :, :-1]
        averages *= keep
        averages += (1 - keep) * used[:, :, None]
        self._features[layers] = features

    def _use_expected(self, entry: int) -> None:
        averages = self._features.reshape(-1, len(self._weights))[self._cell[entry], :-1]
        averages += (1 - averages) * (1 - self._decay)

    def _fit(self) -> None:
        """New weights, once a token: they hardly move in less."""
        if self._num_touches - self._weights_at < self.touches_per_token:
            return
        self._weights_at = self._num_touches
        squares = self._squares + np.eye(len(self._prior))
        products = self._products + self._prior
        # Least squares without negative weights: what comes out negative is left out. (Lawson
        # and Hanson's method may take some back in; the difference does not show.)
        used = np.ones(len(products), np.bool_)
        while True:
            weights = np.zeros(len(products))
            weights[used] = np.linalg.solve(squares[np.ix_(used, used)], products[used])
            if (weights >= 0).all():
                break
            used &= weights > 0
        self._weights = weights

    def _tokens_to_visit(self) -> Values:
        """Per layer, tokens of this model from now until it is visited; more than 0, at most 1.

        Where several streams come by, the best over their visits: n visits in the time until
        the n-th count as one in an n-th of it.
        """
        self._forget_streams()
        if not self._streams:
            return np.ones(self._num_layers)
        upcoming = np.array([at.layer + (not at.stays) for at in self._streams.values()])
        steps = (np.arange(self._num_layers) - upcoming[:, None]) % self._num_layers + 1
        steps.sort(axis=0)
        # A stream goes through all layers while this model makes a token in each.
        tokens = steps * (len(upcoming) / self._num_layers)
        value: Values = (tokens / np.arange(1, len(upcoming) + 1)[:, None]).min(axis=0)
        return value

    def _forget_streams(self) -> None:
        oldest = self._num_touches - _STALE_TURNS * len(self._streams) * self.touches_per_token
        for stream, at in list(self._streams.items()):
            if at.touches < oldest:
                del self._streams[stream]


def _occurrences(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Per element, how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    lengths = np.diff(starts, append=len(values))
    counts = np.empty(len(values), np.int64)
    counts[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return counts

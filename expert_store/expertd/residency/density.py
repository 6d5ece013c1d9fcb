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

from expertd.residency.policy import Entries, Policy, Values
from expertd.settings.policy_names import PolicyName

HALF_LIVES = 4.0 ** np.arange(5)
"""In visits of the layer: from the shortest there is to a few answers' length, or a few tokens'
each of many workers. The fit weighs them; a denser or longer series measures the same."""

MEMORY_TOKENS = float(HALF_LIVES[-1])
"""Half-life of what the fit has seen: as far back as its averages look."""

_MAX_PENDING_TOKENS = 16
"""Tokens after which it learns unasked: so that it learns at all while nothing is evicted."""

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
        self._column = np.arange(self.num_entries) - first[self._layer_of]
        # Layers of fewer experts are padded with features of 0, from which nothing is learned.
        num_features = len(HALF_LIVES) + 1
        self._features: npt.NDArray[np.float32] = np.zeros(
            (self._num_layers, num_features, self._width), np.float32
        )
        # The last feature is what is known without history: all experts alike.
        for layer, (num, used) in enumerate(zip(num_experts, experts_per_token, strict=True)):
            self._features[layer, -1, :num] = used / num
        self._decay = np.exp2(-1 / HALF_LIVES)
        # Before it has learned: the mean of all averages, worth one sample.
        self._prior = np.full(num_features, 1 / len(HALF_LIVES))
        self._prior[-1] = 0
        self._weights = self._prior
        self._weights_at = 0
        self._squares: npt.NDArray[np.float64] = np.zeros((num_features, num_features))
        self._products: npt.NDArray[np.float64] = np.zeros(num_features)
        self._streams: dict[int, _Position] = {}
        self._pending: list[Entries] = []
        self._num_pending = 0

    def leave(self, stream: int) -> None:
        """A stream has ended: nothing is expected of it."""
        super().leave(stream)
        self._streams.pop(stream, None)

    def of(self, entries: Entries) -> Values:
        """Expected hits per token of residency."""
        self._learn()
        self._fit()
        features = self._features[self._layer_of[entries], :, self._column[entries]]
        # Two visits, the second a token after the first.
        per_hit = 2 * self._activity / (1 + self._tokens_to_visit())
        value: Values = features @ self._weights * per_hit[self._layer_of[entries]]
        return value

    def _use(self, entries: Entries, stream: int, tokens: float) -> None:
        layers = self._layer_of[entries]
        last = int(layers[-1])
        before = self._streams.get(stream)
        # Some workers take a prompt through each layer token by token.
        stays = before is not None and before.layer == last and bool((layers == last).all())
        self._streams[stream] = _Position(last, stays, self._num_touches)
        # Learned from when it is asked for: one pass costs nearly as much for a row as for all.
        self._pending.append(entries)
        self._num_pending += len(entries)
        if self._num_pending >= _MAX_PENDING_TOKENS * self.touches_per_token:
            self._learn()

    def _learn(self) -> None:
        """Takes in what was used since it last did: into the fit, then into the averages."""
        if not self._pending:
            return
        entries = np.concatenate(self._pending)
        self._pending.clear()
        self._num_pending = 0
        layers = self._layer_of[entries]
        starts = np.flatnonzero(np.diff(layers, prepend=-1))
        lengths = np.diff(starts, append=len(entries))
        visits = _Visits(layers[starts], lengths / self._per_token[layers[starts]])
        visit = np.repeat(np.arange(len(starts)), lengths)
        features = self._features[visits.layers]  # [V, features, width]
        cells = visits.place[visit] * self._width + self._column[entries]
        size = len(visits.layers) * self._width
        # The fit sees each layer's first visit: of that the averages do not know yet.
        fade = float(0.5 ** (len(entries) / self.touches_per_token / MEMORY_TOKENS))
        first = visits.is_first[visit]
        used = np.bincount(cells[first], 1 / visits.tokens[visit[first]], size)
        used = used.reshape(-1, self._width).astype(np.float32)
        weight = 1 / visits.tokens[visits.is_first][visits.place[visits.is_first].argsort()]
        self._squares *= fade
        self._squares += np.tensordot(weight, features @ features.transpose(0, 2, 1), 1)
        self._products *= fade
        self._products += weight @ (features @ used[:, :, None])[:, :, 0]
        # Each visit moves the averages towards its use, and the later ones of its layer fade it.
        features[:, :-1] *= (self._decay ** visits.total[:, None])[:, :, None]
        for index, decay in enumerate(self._decay):
            share = (1 - decay**visits.tokens) * decay**visits.tokens_after / visits.tokens
            features[:, index] += np.bincount(cells, share[visit], size).reshape(-1, self._width)
        self._features[visits.layers] = features

    def _use_expected(self, entry: int) -> None:
        averages = self._features[self._layer_of[entry], :-1, self._column[entry]]
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


class _Visits:
    """Visits of layers, in order; ``tokens`` says of how many each is, at least."""

    def __init__(self, visited: npt.NDArray[np.int64], tokens: Values) -> None:
        # A prompt's accesses come merged; they are those of at least so many tokens.
        self.tokens = np.maximum(1.0, tokens)
        self.layers, self.place = np.unique(visited, return_inverse=True)
        """Each layer once, and per visit its index among them."""
        self.total = np.bincount(self.place, self.tokens)
        """Per layer, tokens of all its visits."""
        order = np.argsort(self.place, kind="stable")
        first = np.flatnonzero(np.diff(self.place[order], prepend=-1))
        self.is_first = np.zeros(len(visited), np.bool_)
        """Per visit, whether it is its layer's first."""
        self.is_first[order[first]] = True
        done = np.cumsum(self.tokens[order])
        self.tokens_after = np.empty(len(visited))
        """Per visit, tokens of its layer's later visits."""
        self.tokens_after[order] = np.cumsum(self.total)[self.place[order]] - done

"""Which experts a decoded token uses: replayed from a trace, or drawn where there is none."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertstore.trace import Phase, TraceReader


@dataclass(frozen=True)
class Routing:
    """``experts``: int64 [tokens, layers, k]; ``what`` says where they are from."""

    experts: Tensor
    what: str


def routing_for(
    shape: str, num_layers: int, num_experts: int, k: int, tokens: int, traces: Sequence[Path]
) -> Routing:
    """From the first trace of a model of that shape, or else drawn.

    Where the trace has fewer experts per token than ``k``, or there is none for the shape, the
    rest is drawn by Zipf's law, each layer with favourites of its own: neither as even as random
    weights would route, which no cache can serve, nor kinder than real models are.
    """
    chance = random.Random(0)
    favourites = [chance.sample(range(num_experts), num_experts) for _ in range(num_layers)]
    weights = [1 / (rank + 2) for rank in range(num_experts)]
    rows: list[list[list[int]]] = []
    what = "drawn by Zipf's law"
    for path in traces:
        if shape in path.name:
            rows = _decoded(path, num_layers, num_experts)
            what = f"replayed from {path.name}"
            break
    if not rows:
        rows = [[[] for _ in range(num_layers)] for _ in range(tokens)]
    elif len(rows[0][0]) < k:
        what += f", {k - len(rows[0][0])} of {k} drawn"
    result = torch.empty(tokens, num_layers, k, dtype=torch.int64)
    for token in range(tokens):
        for layer in range(num_layers):
            chosen = list(rows[token % len(rows)][layer][:k])
            while len(chosen) < k:
                expert = chance.choices(favourites[layer], weights)[0]
                if expert not in chosen:
                    chosen.append(expert)
            result[token, layer] = torch.tensor(chosen)
    return Routing(result, what)


def swept(routing: Routing, num_experts: int) -> tuple[Routing, int]:
    """The routing after so many tokens that together use every expert of every layer once."""
    _, layers, k = routing.experts.shape
    tokens = -(-num_experts // k)
    sweep = torch.arange(tokens * k).view(tokens, 1, k) % num_experts
    every = torch.cat([sweep.expand(tokens, layers, k), routing.experts])
    return Routing(every, routing.what), tokens


def _decoded(path: Path, num_layers: int, num_experts: int) -> list[list[list[int]]]:
    """The decoded tokens that have all layers; none if the trace is of another shape."""
    steps: dict[int, dict[int, list[int]]] = defaultdict(dict)
    with TraceReader(path) as trace:
        for row in trace:
            if row.phase is Phase.DECODE:
                steps[row.step][row.layer] = list(row.experts)
    rows = [
        [layers[layer] for layer in range(num_layers)]
        for _, layers in sorted(steps.items())
        if set(layers) >= set(range(num_layers))
    ]
    fits = all(expert < num_experts for row in rows for layer in row for expert in layer)
    return rows if fits else []

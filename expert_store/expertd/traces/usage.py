"""What a trace says of each expert of a model: the grounds to keep it in a pruned pack.

Kim et al., *Scalable and Efficient MoE Training for Multitask Multilingual Models* (arXiv
2109.10465), keep the experts that are used most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from expertstore.errors import TraceError
from expertstore.trace import TraceReader


class PruneBy(StrEnum):
    """By what experts are kept."""

    COUNTS = "counts"
    """How often they were used."""
    ACTIVATION = "activation"
    """How much they added to tokens: their results' norms, times the router's weights, in sum."""


@dataclass(frozen=True)
class Usage:
    """How much each expert was used, by layer in the trace's order."""

    layer_ids: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]

    def most_used(self, layer: int, num_kept: int, num_groups: int = 1) -> list[int]:
        """So many experts of ``layer``, in rising order; as many of each group of neighbours."""
        scores = self.scores[self.layer_ids.index(layer)]
        size = len(scores) // num_groups
        kept: list[int] = []
        for first in range(0, len(scores), size):
            group = range(first, first + size)
            best = sorted(group, key=lambda expert: (-scores[expert], expert))
            kept += best[: num_kept // num_groups]
        return sorted(kept)


def read_usage(path: Path, by: PruneBy | None = None) -> Usage:
    """Of a trace; without ``by`` the activation where the trace has it, and else counts.

    Raises TraceError if it cannot be read, lacks what is asked for, or knows nothing of a layer.
    """
    with TraceReader(path) as trace:
        model = trace.model
        if by is PruneBy.ACTIVATION and not model.weighted:
            raise TraceError(
                f"{path} does not say how much experts added to tokens; record it with `expert-run "
                "trace`, or prune by counts."
            )
        weighted = model.weighted and by is not PruneBy.COUNTS
        scores = [[0.0] * num for num in model.num_experts]
        for row in trace:
            added: Sequence[float] = row.weights if weighted else (1.0,) * len(row.experts)
            for expert, weight in zip(row.experts, added, strict=True):
                scores[row.layer][expert] += weight
    for layer, of_layer in zip(model.layer_ids, scores, strict=True):
        if not any(of_layer):
            raise TraceError(f"{path} has nothing of layer {layer}; record for longer.")
    return Usage(model.layer_ids, tuple(map(tuple, scores)))

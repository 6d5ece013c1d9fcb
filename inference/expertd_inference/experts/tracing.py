"""Which experts a text's tokens use, and how much each expert adds to a token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertd_inference.experts.call import ExpertsCall, ExpertsRunner, ExpertsSeat, experts_asked_of
from expertd_inference.kernels.wave import Routed


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """What the rows of a text asked of one layer."""

    layer: int
    """The number of the decoder layer."""
    experts: Tensor
    """[T, k]; a number past the layer's last expert means "none"."""
    added: Tensor
    """[T, k], float32: the norm of what each added to its row, the router's weight included.

    Lasby et al., *REAP the Experts* (arXiv 2510.13999), prune by it.
    """


def traced(model: nn.Module, compute: Callable[[], object]) -> list[TracedLayer]:
    """What the experts of ``model`` are asked by ``compute``, layer by layer. Slow.

    Raises what ``compute`` does.
    """
    layers: list[TracedLayer] = []
    with experts_asked_of(model, lambda seat: _Tracer(seat, layers)):
        compute()
    return layers


class _Tracer(ExpertsRunner):
    """In the place of what computes the experts of ``seat``, which it asks for one at a time."""

    def __init__(self, seat: ExpertsSeat, layers: list[TracedLayer]) -> None:
        self._runner = seat.runner
        self._layers = layers

    def run(self, call: ExpertsCall, /) -> Tensor:
        routed = call.routed
        parts = [
            self._runner.run(
                call.with_rows(
                    Routed(routed.rows, routed.index[:, at, None], routed.weights[:, at, None])
                )
            ).float()
            for at in range(routed.top_k)
        ]
        together = torch.stack(parts, dim=1)  # [T, k, H]
        self._layers.append(TracedLayer(call.layer, routed.index.cpu(), together.norm(dim=2).cpu()))
        return together.sum(dim=1).to(routed.rows.dtype)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        return call

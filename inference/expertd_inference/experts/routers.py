"""Which experts a layer is going to choose, asked of the model's own router ahead of time.

Speculation applies a later layer's router to what entered an earlier one: the residual stream
changes little from layer to layer (Eliseev & Mazur, arXiv 2312.17238, section 3.2). How a
router scores, biases, groups and normalizes is its own business, so it is called, not imitated.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.experts.keeping import kept_of
from expertstore.pack.manifest import Manifest

_NAMES = ("gate", "router")
"""What the attribute beside the experts is called that holds their router."""


class LayerRouter:
    """The router of one MoE layer; may be asked while another thread runs the model."""

    def __init__(self, module: nn.Module, num_experts: int, extra: Iterable[object] = ()) -> None:
        """``extra`` are arguments that its block hands to ``module`` beside hidden states."""
        self._module: Any = module
        self._extra = tuple(extra)
        self.num_experts = num_experts

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:  # [T, H] -> [num], int64
        """``num`` experts by falling probability that one of these tokens uses them.

        ``hidden`` is what enters the layer's experts, or is taken for it. First come those that
        the router chooses for some token, those chosen most and with most weight first; then
        the others by their mean probability. A layer has no more than its experts, so the
        answer may be shorter. On ``hidden``'s device; waits for nothing there.
        """
        if (kept := kept_of(len(hidden))) is not None:
            num = min(num, sum(kept.most_of_rows))
        return torch.topk(self._scores(hidden), min(num, self.num_experts)).indices

    def foreseen(self, hidden: Tensor) -> list[int]:  # [T, H]
        """All experts that the router chooses for some of these tokens, likeliest first."""
        scores = self._scores(hidden)
        num_chosen = int((scores >= 1).sum())
        likeliest: list[int] = torch.topk(scores, num_chosen).indices.tolist()
        return likeliest

    def chosen(self, hidden: Tensor) -> Tensor:  # [T, H] -> [T, k], int64
        """The experts that the layer uses for ``hidden``, in the router's order.

        Where rows keep fewer than it chooses, the others become ``num_experts``.
        """
        with torch.no_grad():
            return self._decide(hidden)[2].to(hidden.device)

    def _scores(self, hidden: Tensor) -> Tensor:  # [T, H] -> [E], float32
        """The sum of votes for those that are chosen, each 1 or more; below 1 for the others."""
        with torch.no_grad():
            logits, weights, chosen = self._decide(hidden)
            scores = torch.softmax(logits.float(), dim=-1).mean(dim=0)
            votes = 1 + weights.float().abs()
            scores = torch.cat((scores, scores.new_zeros(1)))  # for what is dropped
            scores = scores.scatter_add(0, chosen.flatten(), votes.flatten())
            return scores[: self.num_experts].to(hidden.device)

    def _decide(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, k] and experts [T, k]. Raises ValueError for another answer.

        transformers' routers return them in this order or, some of older releases, in the reverse
        one.
        """
        # A layer of a model that is spread over devices may lie on another than its predecessor.
        hidden = hidden.to(self._module.weight.device)
        # Not as the model calls it: hooks would take this for the layer's own routing.
        answer = type(self._module).forward(self._module, hidden, *self._extra)
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise ValueError(f"the router returned {type(answer).__name__}")
        logits, weights, chosen = answer
        if logits.dtype.is_floating_point == chosen.dtype.is_floating_point:
            raise ValueError("the router's answer has no experts")
        if not logits.dtype.is_floating_point:
            logits, chosen = chosen, logits
        rows = hidden.shape[0]
        if logits.shape != (rows, self.num_experts) or weights.shape != chosen.shape:
            raise ValueError("the router's answer is of another shape")
        if (kept := kept_of(rows)) is not None:
            chosen = kept.of(weights, chosen, self.num_experts)
        return logits, weights, chosen.long()


def find_routers(
    model: nn.Module, experts: Mapping[int, nn.Module], manifest: Manifest | None = None
) -> Mapping[int, LayerRouter]:
    """The router of each layer of ``experts``, which are modules of ``model`` by layer.

    A layer is left out if no router stands beside its experts or it does not answer as
    transformers' routers do, and if by the ``manifest`` its experts take other rows than its router
    (the latent experts of Nemotron 3); nothing can be speculated for it.
    """
    layers = {id(module): layer for layer, module in experts.items()}
    widths: dict[int, int] = {}
    if manifest is not None:
        widths = {x.layer: manifest.layouts[x.layout].inward.in_features for x in manifest.layers}
    routers = {}
    for block in model.modules():
        for module in block.children():
            layer = layers.get(id(module))
            router = None if layer is None else _router_beside(module, block, widths.get(layer))
            if layer is not None and router is not None:
                routers[layer] = router
    return dict(sorted(routers.items()))


def _router_beside(
    experts: Any,  # noqa: ANN401 - untyped
    block: nn.Module,
    width: int | None,
) -> LayerRouter | None:
    for name in _NAMES:
        module = getattr(block, name, None)
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if width not in (None, weight.shape[1]):
            continue
        try:
            router = LayerRouter(module, experts.num_experts, _extra_arguments(module, block))
            router.chosen(weight.new_zeros(1, weight.shape[1]))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            continue  # Something else, or one that needs what only its block's forward knows.
        return router
    return None


def _extra_arguments(router: nn.Module, block: nn.Module) -> list[object]:
    """What ``router`` takes beside hidden states: a bias, say, that its block has by that name.

    Raises AttributeError if it needs what the block does not have.
    """
    arguments = []
    for parameter in list(inspect.signature(type(router).forward).parameters.values())[2:]:
        if parameter.default is inspect.Parameter.empty:
            arguments.append(getattr(block, parameter.name))
        else:
            arguments.append(getattr(block, parameter.name, parameter.default))
    return arguments

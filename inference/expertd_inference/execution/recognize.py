"""What the modules of a model compute, told by trying them on random input.

A description here is of plain values: the weights and the formula. A part is what it is described
as only if its own ``forward`` gives that formula's results, whatever the part is called; nothing of
it is changed for that. What is not recognized is None, and is computed by its module.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertd_inference.kernels.activation import Activation, activation_of_function
from expertd_inference.kernels.cpu.linear import DTYPES, describe
from expertd_inference.kernels.cpu.native import matrix_of
from expertd_inference.kernels.cpu.operations import NormKind, RouteKind
from expertd_inference.kernels.cpu.structures import NativeMatrix
from expertd_inference.model.quantized_linear import QuantizedLinear

_TRIAL_ROWS = 24
_MAX_DIFFERING = 0.02
"""Share of results that may be rounded to a neighbour, where the sums' order decides it."""


@dataclass(frozen=True, eq=False)
class NormSpec:
    """Of rows of ``len(weight)``; weight and bias are float32."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: NormKind


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """``bias`` is added after the product was rounded; a bias of the matrix before."""

    matrix: NativeMatrix
    bias: Tensor | None
    kept: object
    """What must live as long as this."""


@dataclass(frozen=True, eq=False)
class RouterSpec:
    """How a layer's experts are chosen: the formula, and the logits' matrix."""

    matrix: NativeMatrix
    kept: object
    k: int
    kind: RouteKind
    normalize: bool
    float_logits: bool
    weights_dtype: torch.dtype
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class FeedForwardSpec:
    """``down(activation(gate(x)) * up(x))``."""

    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec
    activation: Activation


def recognize_linear(module: Any) -> LinearSpec | None:  # noqa: ANN401 - a module
    """A linear layer whose weight a native kernel multiplies with, quantized or plain."""
    if isinstance(module, QuantizedLinear):
        weight = module.quantized
        matrix = matrix_of(weight)
        bias = module.bias
        if matrix is None or not (bias is None or _plain(bias)):
            return None
        return LinearSpec(matrix, bias, (weight, bias))
    if not isinstance(module, nn.Linear) or not _plain(module.weight):
        return None
    bias = module.bias
    if bias is not None and not (_plain(bias) and bias.dtype is module.weight.dtype):
        return None
    return LinearSpec(describe(module.weight, bias), None, (module.weight, bias))


def recognize_norm(module: Any) -> NormSpec | None:  # noqa: ANN401 - a module
    """A norm over the last dimension: of squares, or of what differs from the mean."""
    weight: object = getattr(module, "weight", None)
    bias: object = getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not _vector(weight) or not isinstance(eps, float) or not (bias is None or _vector(bias)):
        return None
    # Small rows, too: there it shows what is added under the root.
    x = _noise(_TRIAL_ROWS, len(weight)) * torch.logspace(-4, 1, _TRIAL_ROWS)[:, None]
    x = x.to(weight.dtype)
    try:
        with torch.no_grad():
            expected = module(x)
    except (TypeError, ValueError, RuntimeError):
        return None
    wide = None if bias is None else bias.float()
    for kind in NormKind:
        for shift in (0.0, 1.0):
            norm = NormSpec((weight.float() + shift).contiguous(), wide, float(eps), kind)
            if _agree(_norm(norm, x), expected):
                return norm
    return None


def _norm(norm: NormSpec, x: Tensor) -> Tensor:
    wide = x.float()
    if norm.kind is NormKind.LAYER:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.kind is NormKind.RMS_ROUND:
        normed = normed.to(x.dtype).float()
    normed = normed * norm.weight
    return (normed if norm.bias is None else normed + norm.bias).to(x.dtype)


def recognize_router(module: Any, block: nn.Module) -> RouterSpec | None:  # noqa: ANN401 - a module
    """The router of ``block``, by any of the kernels' formulas."""
    weight, k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not _plain(weight):
        return None
    if not isinstance(k, int) or not 0 < k <= len(weight):
        return None
    x = _noise(_TRIAL_ROWS, weight.shape[1]).to(weight.dtype)
    try:
        with torch.no_grad():
            answer = module(x, *_extra_arguments(module, block))
        _, weights, index = answer
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None  # It asks for more than hidden states, or answers otherwise.
    if weights.is_floating_point() == index.is_floating_point():
        return None
    if weights.dtype not in DTYPES or index.shape != (_TRIAL_ROWS, k):
        return None
    bias = getattr(module, "bias", None)
    if bias is not None and not (_vector(bias) and bias.dtype is weight.dtype):
        return None
    for float_logits in (False, True):
        logits = functional.linear(x, weight, bias)
        if float_logits:
            wide = None if bias is None else bias.float()
            logits = functional.linear(x.float(), weight.float(), wide)
        for trial in _routers(module, block, weight, bias, k, weights.dtype):
            router = replace(trial, float_logits=float_logits)
            ours, chosen = route(router, logits)
            if _same_choice(ours, chosen, weights, index):
                return router
    return None


def _routers(
    module: Any,  # noqa: ANN401 - a module
    block: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    dtype: torch.dtype,
) -> Iterator[RouterSpec]:
    """All that it may be."""
    matrix, kept = describe(weight, bias), (weight, bias)
    made = RouterSpec(matrix, kept, k, RouteKind.SOFTMAX, False, False, dtype)
    yield made
    yield replace(made, normalize=True)
    yield replace(made, kind=RouteKind.TOP_SOFTMAX)
    if k == 2 and isinstance(jitter := getattr(module, "router_jitter_noise", None), float):
        yield replace(made, kind=RouteKind.SPARSE_MIXER, scale=jitter)
    correction = getattr(module, "e_score_correction_bias", None)
    if correction is None:
        correction = getattr(block, "e_score_correction_bias", None)
    if correction is not None and not isinstance(correction, Tensor):
        correction = getattr(correction, "e_score_correction_bias", None)
    scale = getattr(module, "routed_scaling_factor", 1.0)
    groups = getattr(module, "num_group", getattr(module, "n_group", 1)) or 1
    for normalize in (True, False):
        yield replace(
            made,
            kind=RouteKind.SIGMOID,
            normalize=normalize,
            bias=None if correction is None else correction.float().flatten().contiguous(),
            groups=groups,
            top_groups=getattr(module, "topk_group", 1) or 1,
            scale=float(1.0 if scale is None else scale),
        )


def route(router: RouterSpec, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of ``router`` in torch: weights and experts, [T, k] each."""
    wide = logits.float()
    if router.kind is RouteKind.SPARSE_MIXER:
        return _mix_sparsely(logits, router)
    if router.kind is RouteKind.SOFTMAX:
        wide = torch.softmax(wide, -1)
    elif router.kind is RouteKind.SIGMOID:
        wide = torch.sigmoid(wide)
    score = wide if router.bias is None else wide + router.bias
    if router.groups > 1:
        grouped = score.view(len(score), router.groups, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(router.top_groups, -1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, value=True)
        score = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    index = score.topk(router.k, -1).indices
    weights = wide.gather(1, index)
    if router.kind is RouteKind.TOP_SOFTMAX:
        weights = torch.softmax(weights, -1)
    if router.normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + 1e-20 if router.kind is RouteKind.SIGMOID else total)
    if router.kind is RouteKind.SIGMOID:
        weights = weights * router.scale
    return weights.to(router.weights_dtype), index


def _mix_sparsely(logits: Tensor, router: RouterSpec) -> tuple[Tensor, Tensor]:
    weights, index, left = [], [], logits
    for _ in range(2):
        most, best = left.max(-1, keepdim=True)
        far = (most - logits) / logits.abs().clamp(min=most) > 2 * router.scale
        near = torch.softmax(left.masked_fill(far, -torch.inf), -1)
        weights.append(near.gather(-1, best))
        index.append(best)
        left = left.scatter(-1, best, -torch.inf)
    return torch.cat(weights, -1).to(router.weights_dtype), torch.cat(index, -1)


def _same_choice(ours: Tensor, chosen: Tensor, weights: Tensor, index: Tensor) -> bool:
    """In whatever order. A few rows may choose otherwise: of near equals rounding decides."""
    our_order, their_order = chosen.argsort(-1), index.argsort(-1)
    same = (chosen.gather(-1, our_order) == index.gather(-1, their_order)).all(-1)
    if same.float().mean() < 1 - 3 / _TRIAL_ROWS:
        return False
    pair = ours.gather(-1, our_order)[same], weights.gather(-1, their_order)[same]
    return torch.allclose(pair[0].float(), pair[1].float(), rtol=0.02, atol=1e-4)


def recognize_feed_forward(module: Any) -> FeedForwardSpec | None:  # noqa: ANN401 - a module
    """A gated feed-forward, by its three linear layers."""
    children = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= children or children - _FEED_FORWARD:
        return None
    activation = activation_of_function(getattr(module, "act_fn", None))
    parts = [recognize_linear(getattr(module, f"{name}_proj")) for name in ("gate", "up", "down")]
    gate, up, down = parts
    if activation is None or gate is None or up is None or down is None:
        return None
    return FeedForwardSpec(gate, up, down, activation)


_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _extra_arguments(router: Any, block: nn.Module) -> list[object]:  # noqa: ANN401 - a module
    """What ``router`` takes beside hidden states: what its block has by that name."""
    parameters = list(inspect.signature(type(router).forward).parameters.values())[2:]
    return [
        getattr(block, each.name)
        if each.default is inspect.Parameter.empty
        else getattr(block, each.name, each.default)
        for each in parameters
        if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in DTYPES


def _vector(tensor: object) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.dim() == 1 and _plain(tensor)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(ours: Tensor, theirs: object) -> bool:
    if not isinstance(theirs, Tensor) or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    epsilon = torch.finfo(ours.dtype).eps
    if not torch.allclose(ours.float(), theirs.float(), rtol=max(2 * epsilon, 1e-5), atol=1e-6):
        return False
    differing = (ours != theirs).float().mean().item()
    return ours.dtype == torch.float32 or differing <= _MAX_DIFFERING

"""One run of a model's modules, watched: what a program is made by and held against.

A short text is computed by the modules as they are, with attention in torch and with experts that
cost nothing (:class:`StandIn`), so that no expert is read. What the modules hand to one another is
noted: it tells how they are put together, and each layer's result from its own input is what a
program's must be.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from expertd_inference.experts.call import ExpertsCall, experts_asked_of

NUM_TOKENS = 12
"""Few: a layer's weights are read once for all of them, and that is what takes time."""
_ATTENTION = "expertd-witness"


@dataclass
class Attended:
    """What one call of the attention function was given."""

    query: Tensor  # [1, heads, T, d]
    key: Tensor  # [1, kv_heads, T, d]
    value: Tensor
    scale: float
    options: dict[str, Any]


@dataclass
class LayerSeen:
    """What entered and left one decoder layer, [1, T, H], and the arguments beside."""

    entered: Tensor
    arguments: dict[str, Any]
    left: Tensor | None = None
    attended: list[Attended] = field(default_factory=list)


@dataclass
class Witness:
    """All that was noted."""

    tokens: list[int]
    layers: list[LayerSeen]
    rotations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]
    """Modules of angles, with the arguments and the result of each call."""
    normed: Tensor | None
    """What entered the head."""
    projected: Tensor | None
    """What left it."""
    logits: Tensor
    found: dict[tuple[int, int, bool], Any] = field(default_factory=dict)
    """Rotations that were recognized, so that layers share them."""


_watching: list[Witness] = []


def watch(model: Any, layers: list[nn.Module], head: nn.Module) -> Witness:  # noqa: ANN401
    """Runs ``model`` for a few tokens. Raises what it raises."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = [int(x) for x in torch.randint(vocabulary, (NUM_TOKENS,), generator=_generator())]
    witness = Witness(tokens, [], [], None, None, torch.empty(0))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(experts_stood_in_for(model))
        stack.enter_context(_attention_noted(model, witness))
        handles = [
            *(
                layer.register_forward_pre_hook(_enter(witness), with_kwargs=True)
                for layer in layers
            ),
            *(each.register_forward_hook(_leave(witness)) for each in layers),
            *(
                module.register_forward_hook(_turn(witness), with_kwargs=True)
                for name, module in model.named_modules()
                if "rotary" in name.rsplit(".", 1)[-1]
            ),
            head.register_forward_hook(_project(witness)),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        answer = model(input_ids=torch.tensor([tokens]), use_cache=False, return_dict=True)
        witness.logits = answer.logits
    return witness


class StandIn:
    """In the place of what computes experts: each multiplies by a number of its own."""

    def run(self, call: ExpertsCall, /) -> Tensor:
        """As :class:`~expertd_inference.experts.call.ExpertsRunner`."""
        rows, index, weights = call.routed.rows, call.routed.index, call.routed.weights
        factors = 0.5 + (index * 37 % 64) / 64
        return (rows.float() * (factors * weights.float()).sum(-1, keepdim=True)).to(rows.dtype)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """There is nothing to prepare."""
        return call


@contextmanager
def experts_stood_in_for(model: nn.Module) -> Iterator[None]:
    """While the experts of ``model`` are those of :class:`StandIn`."""
    with experts_asked_of(model, lambda _: StandIn()):
        yield


@contextmanager
def _attention_noted(model: Any, witness: Witness) -> Iterator[None]:  # noqa: ANN401
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    _watching.append(witness)
    try:
        yield
    finally:
        _watching.pop()
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,  # noqa: ANN401 - whatever a model has
) -> tuple[Tensor, None]:
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    _watching[-1].layers[-1].attended.append(Attended(query, key, value, scale, options))
    return attend(query, key, value, scale, attention_mask, options).transpose(1, 2), None


def attend(
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, kv_heads, T, d]
    value: Tensor,
    scale: float,
    mask: Tensor | None,  # [1, 1, T, T], True where a row sees
    options: dict[str, Any],
) -> Tensor:  # [1, heads, T, d]
    """Attention of one whole sequence, in float32."""
    groups = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(groups, 1)
    values = value.float().repeat_interleave(groups, 1)
    scores = query.float() @ keys.transpose(2, 3) * scale
    if (softcap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask.float()
    if (sinks := options.get("s_aux")) is not None:
        sinks = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return (weights @ values).to(query.dtype)


def _enter(witness: Witness) -> Any:  # noqa: ANN401 - a hook
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        witness.layers.append(LayerSeen(entered.clone(), dict(kwargs)))

    return enter


def _leave(witness: Witness) -> Any:  # noqa: ANN401 - a hook
    def leave(_: nn.Module, __: object, result: Any) -> None:  # noqa: ANN401
        left = result[0] if isinstance(result, tuple) else result
        witness.layers[-1].left = left.clone()

    return leave


def _turn(witness: Witness) -> Any:  # noqa: ANN401 - a hook
    def turn(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:  # noqa: ANN401
        witness.rotations.append((module, args, kwargs, result))

    return turn


def _project(witness: Witness) -> Any:  # noqa: ANN401 - a hook
    def project(_: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
        witness.normed, witness.projected = args[0].clone(), result.clone()

    return project


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, sdpa_mask)

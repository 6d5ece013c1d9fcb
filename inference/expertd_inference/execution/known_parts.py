"""The parts that a decode program knows: how most models name and build them.

A check here is for what a program would go around or could not see. That the parts compute what
their names say is not checked but rehearsed (:mod:`.rehearsal`).
"""

from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module

from expertd_inference.execution.attention_hook import ATTENTION
from expertd_inference.kv.growing import GrowingLayer

_MODEL = {"model", "lm_head"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}


class UnknownPartError(Exception):
    """The model has a part that no program has an operation for; the message says which."""


def check_plain(model: Any) -> None:  # noqa: ANN401 - untyped
    """Raises UnknownPartError for what a program would go around or does not see."""
    _check_children(model, _MODEL)
    _check_children(model.model, _BODY)
    config = model.config
    if config._attn_implementation != ATTENTION:
        raise UnknownPartError("its attention is not native")
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = kinds - {"full_attention"} if kinds else getattr(config, "sliding_window", None)
    if windowed or getattr(config, "attention_chunk_size", None):
        raise UnknownPartError("its attention does not see all tokens")
    if model.training or _hooked(torch_module, "_global"):
        raise UnknownPartError("it is hooked or in training")
    for module in model.modules():
        if _hooked(module) or "forward" in module.__dict__:
            raise UnknownPartError(f"something is hooked to its {type(module).__name__}")


def check_layer(layer: Any) -> None:  # noqa: ANN401 - untyped
    """Raises UnknownPartError for a decoder layer with other parts than most have."""
    _check_children(layer, _LAYER)
    _check_children(layer.self_attn, _ATTENTION, _HEAD_NORMS)
    if not all(hasattr(layer.self_attn, name) for name in ("head_dim", "scaling")):
        raise UnknownPartError(f"its {type(layer.self_attn).__name__} is built otherwise")


def norm_weight(norm: Any) -> Tensor:  # noqa: ANN401 - a module
    """Of a norm that is native; raises UnknownPartError for another."""
    if not hasattr(norm, "expertd_round_first"):
        raise UnknownPartError(f"its {type(norm).__name__} is not native")
    weight: Tensor = norm.weight
    return weight


def growing_layers(cache: Any, num_layers: int) -> list[GrowingLayer]:  # noqa: ANN401 - untyped
    """Those of ``cache``; raises UnknownPartError if it keeps keys and values in another way."""
    layers = list(getattr(cache, "layers", ()))
    if len(layers) != num_layers or any(type(layer) is not GrowingLayer for layer in layers):
        raise UnknownPartError("its keys and values are kept otherwise")
    return layers


def _hooked(holder: Any, prefix: str = "") -> bool:  # noqa: ANN401 - a module, or torch's
    hooks = [getattr(holder, f"{prefix}_forward_{kind}") for kind in ("hooks", "pre_hooks")]
    return any(hooks)


def _check_children(
    module: Any,  # noqa: ANN401 - untyped
    known: set[str],
    more: AbstractSet[str] = frozenset(),
) -> None:
    """Raises UnknownPartError unless it has all of ``known``, and else only some of ``more``."""
    children = {name for name, _ in module.named_children()}
    if not known <= children <= known | more:
        raise UnknownPartError(f"its {type(module).__name__} is built otherwise")

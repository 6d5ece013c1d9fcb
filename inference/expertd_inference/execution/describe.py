"""A transformers model as the parts that a program knows, or why it is not made of them.

How a layer is put together is told by what its children are called, and how they work by trial
(:mod:`.recognize`) and by what they hand to one another in a run that is watched (:mod:`.witness`).
Neither is a proof: whoever makes a program of it holds the results against the modules'
(:mod:`.check`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.execution.parts import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    UnknownPartError,
)
from expertd_inference.execution.recognize import (
    FeedForwardSpec,
    LinearSpec,
    NormSpec,
    recognize_feed_forward,
    recognize_linear,
    recognize_norm,
    recognize_router,
)
from expertd_inference.execution.rotation import find_rotation, near
from expertd_inference.execution.witness import LayerSeen, Witness, watch
from expertd_inference.experts.call import has_seat
from expertd_inference.kernels.cpu.linear import DTYPES
from expertd_inference.model.pack_config import rope_kinds

_BODY = {"embed_tokens", "layers", "norm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_FEED_FORWARDS = ("mlp", "block_sparse_moe", "feed_forward", "moe")
_ROUTERS = ("gate", "router")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_HARMLESS = {
    *("position_ids", "use_cache", "cache_position", "is_causal", "return_dict", "logits_to_keep"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "position_embeddings"),
    *("sliding_window", "s_aux", "softcap"),
}
"""What an attention function is given that a program knows, or that changes nothing."""

# The norms of a layer by their names: before and after the attention, before and after the rest.
_NORMS: dict[frozenset[str], tuple[str | None, str | None, str | None, str | None]] = {
    frozenset(names for names in form if names): form
    for form in (
        ("input_layernorm", None, "post_attention_layernorm", None),
        (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        *(
            (
                "input_layernorm",
                "post_attention_layernorm",
                f"pre_{name}_layernorm",
                f"post_{name}_layernorm",
            )
            for name in ("feedforward", "mlp")
        ),
    )
}


def describe_model(model: Any) -> tuple[ModelSpec, Witness]:  # noqa: ANN401 - transformers is untyped
    """What ``model`` computes, and the run that was watched. Raises UnknownPartError."""
    body = model.model if hasattr(model, "model") else None
    if body is None or _children(model) != {"model", "lm_head"}:
        raise UnknownPartError(f"its {type(model).__name__} is built otherwise")
    others = {name for name in _children(body) if "rotary" not in name}
    if others != _BODY:
        raise UnknownPartError(f"its {type(body).__name__} is built otherwise")
    table = body.embed_tokens.weight
    if table.dtype not in DTYPES or not table.is_cpu or not table.is_contiguous():
        raise UnknownPartError("its embedding is not of 16 or 32 bits on the CPU")
    _check_config(model.config)
    witness = watch(model, list(body.layers), model.lm_head)
    if len(witness.layers) != len(body.layers) or witness.normed is None:
        raise UnknownPartError("its layers are not called one after the other")
    assert witness.projected is not None
    layers = tuple(
        _describe_layer(layer, seen, witness, _window_kind(model.config, number))
        for number, (layer, seen) in enumerate(zip(body.layers, witness.layers, strict=True))
    )
    embedded = table[torch.tensor(witness.tokens)][None]
    described = ModelSpec(
        embedding=table,
        embedding_scale=_ratio(
            embedded,
            witness.layers[0].entered,
            getattr(model.config, "embedding_multiplier", 1.0),
        ),
        layers=layers,
        norm=_known_norm(body.norm),
        head=_known_linear(model.lm_head),
        logits_divisor=1
        / _ratio(
            witness.projected, witness.logits, 1 / getattr(model.config, "logits_scaling", 1.0)
        ),
        model=model,
    )
    return described, witness


def _check_config(config: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Raises UnknownPartError for what does not show with a short text."""
    if getattr(config, "clip_qkv", None) is not None:
        raise UnknownPartError("its attention clips what enters it")
    if getattr(config, "attention_chunk_size", None):
        raise UnknownPartError("its attention sees chunks")
    if getattr(config, "num_kv_shared_layers", None):
        raise UnknownPartError("its layers share keys")
    context = getattr(config, "max_position_embeddings", None)
    for kind in rope_kinds(config):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings", context)
            if kind["rope_type"] == "dynamic" or original is None or original != context:
                raise UnknownPartError("its angles depend on the text's length")


def _window_kind(config: Any, number: int) -> str | None:  # noqa: ANN401
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return None
    if kinds[number] not in (_FULL, _SLIDING):
        raise UnknownPartError(f"layer {number} has {kinds[number]}".replace("_", " "))
    kind: str = kinds[number]
    return kind


def _describe_layer(layer: Any, seen: LayerSeen, witness: Witness, kind: str | None) -> LayerSpec:  # noqa: ANN401
    otherwise = UnknownPartError(f"its {type(layer).__name__} is built otherwise")
    children = _children(layer)
    rest = [name for name in _FEED_FORWARDS if name in children]
    form = _NORMS.get(frozenset(children - {"self_attn", *rest}))
    if "self_attn" not in children or len(rest) != 1 or form is None or len(seen.attended) != 1:
        raise otherwise
    norms = [None if name is None else getattr(layer, name) for name in form]
    entered = seen.entered if norms[0] is None else norms[0](seen.entered)
    attention = _describe_attention(layer.self_attn, entered, seen, witness)
    if kind is not None and (attention.window is None) != (kind == _FULL):
        raise UnknownPartError("its windows are told otherwise")
    before, after, before_rest, after_rest = (
        None if norm is None else _known_norm(norm) for norm in norms
    )
    return LayerSpec(
        attention=attention,
        before_attention=before,
        after_attention=after,
        feed_forward=_describe_feed_forward(getattr(layer, rest[0])),
        before_feed_forward=before_rest,
        after_feed_forward=after_rest,
        multiplier=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _describe_attention(
    module: Any,  # noqa: ANN401 - a module
    entered: Tensor,  # [1, T, H]
    seen: LayerSeen,
    witness: Witness,
) -> AttentionSpec:
    otherwise = UnknownPartError(f"its {type(module).__name__} is built otherwise")
    children = _children(module)
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= children <= _ATTENTION:
        raise otherwise
    call = seen.attended[0]
    unknown = {name for name, value in call.options.items() if value is not None} - _HARMLESS
    if unknown:
        raise UnknownPartError(f"its attention is told {min(unknown)}")
    _, heads, _, key_width = call.query.shape
    _, kv_heads, _, value_width = call.value.shape
    norms = [getattr(module, f"{name}_norm", None) for name in "qk"]
    query, key, value = (getattr(module, f"{name}_proj")(entered) for name in "qkv")
    query, key = (
        rows if norm is None else _normed(norm, rows, key_width)
        for norm, rows in zip(norms, (query, key), strict=True)
    )
    query, key = (rows.unflatten(-1, (-1, key_width)).transpose(1, 2) for rows in (query, key))
    if not near(value.unflatten(-1, (-1, value_width)).transpose(1, 2), call.value):
        raise otherwise
    rotation = find_rotation(query, key, call, seen, witness)
    sinks = call.options.get("s_aux")
    window = call.options.get("sliding_window")
    parts = [_known_linear(getattr(module, f"{name}_proj")) for name in "qkvo"]
    query_norm, key_norm = (None if norm is None else _known_norm(norm) for norm in norms)
    return AttentionSpec(
        query=parts[0],
        key=parts[1],
        value=parts[2],
        output=parts[3],
        query_norm=query_norm,
        key_norm=key_norm,
        rotation=rotation,
        heads=heads,
        kv_heads=kv_heads,
        key_width=key_width,
        value_width=value_width,
        scale=float(call.scale),
        window=None if window is None else int(window),
        softcap=call.options.get("softcap"),
        sinks=None if sinks is None else sinks.detach().float().contiguous(),
    )


def _normed(norm: Any, rows: Tensor, width: int) -> Tensor:  # noqa: ANN401 - a module
    """Of each head, or of all, as the size of the norm is."""
    if len(norm.weight) == width:
        result: Tensor = norm(rows.view(*rows.shape[:-1], -1, width)).flatten(-2)
    else:
        result = norm(rows)
    return result


def _describe_feed_forward(block: nn.Module) -> FeedForwardSpec | MoeSpec | nn.Module:
    """As parts, or the module itself."""
    return _as_parts(block) or block


def _as_parts(block: Any) -> FeedForwardSpec | MoeSpec | None:  # noqa: ANN401 - a module
    children = _children(block)
    routers = [name for name in _ROUTERS if name in children]
    shared = [name for name in _SHARED if name in children]
    gated = {"shared_expert_gate"} & children
    if "experts" not in children or not has_seat(block.experts):
        return recognize_feed_forward(block)
    if len(routers) != 1 or len(shared) > 1 or children != {"experts", *routers, *shared, *gated}:
        return None
    router = recognize_router(getattr(block, routers[0]), block)
    beside = recognize_feed_forward(getattr(block, shared[0])) if shared else None
    gate = recognize_linear(block.shared_expert_gate) if gated else None
    if router is None or (beside is None) != (not shared) or (gate is None) != (not gated):
        return None
    return MoeSpec(router, block.experts, beside, gate)


def _known_norm(module: Any) -> NormSpec:  # noqa: ANN401 - a module
    norm = recognize_norm(module)
    if norm is None:
        raise UnknownPartError(f"its {type(module).__name__} is none that is known")
    return norm


def _known_linear(module: Any) -> LinearSpec:  # noqa: ANN401 - a module
    linear = recognize_linear(module)
    if linear is None:
        raise UnknownPartError(f"a {type(module).__name__} has no native kernel")
    return linear


def _ratio(x: Tensor, y: Tensor, guess: float) -> float:
    """By what ``x`` is multiplied to give ``y``: ``guess``, or what fits best."""
    for factor in (1.0, guess):
        if torch.equal(x * factor, y):
            return float(factor)
    wide = x.double()
    return float((wide * y.double()).sum() / wide.square().sum())


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}

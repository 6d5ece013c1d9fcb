"""``config.json`` of a pack: read, and checked for what transformers notices too late or never."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from expertd_inference.process.reasons import reason_of
from expertstore.errors import PackError
from expertstore.pack.manifest import Manifest

CONFIG = "config.json"

_EVERYWHERE = frozenset({"eager", "sdpa"})
"""The attention implementations that transformers has on every host."""

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "top_k")
"""Models' names for it; the packer's."""


def read_config(
    pack: Path,
    manifest: Manifest,
    model_class: Any,  # noqa: ANN401 - transformers is untyped
    *,
    max_layers: int,
    on_gpu: bool,
    say: Callable[[str], None],
) -> Any:  # noqa: ANN401
    """The configuration of the pack's model, ready to make a ``model_class`` of it.

    ``max_layers`` is how many the trunk has. ``say`` is told of a wish that this host cannot
    fulfil, and what is done instead. Raises PackError, naming the file, if it cannot be used.
    """
    path = pack / CONFIG
    if not path.is_file():
        # transformers would take its defaults.
        raise PackError(f"{pack} has no {CONFIG}; make the pack again.")
    try:
        config = model_class.config_class.from_pretrained(pack, local_files_only=True)
    except Exception as error:  # whatever transformers meets in a configuration it cannot use
        raise PackError(f"{path} cannot be used: {reason_of(error)}.") from error
    # A checkpoint that came quantized says so here; the pack's trunk no longer is.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model's parts are asked for their results by name.
    config.return_dict = True
    try:
        _check(config, manifest, max_layers)
    except ValueError as error:
        raise PackError(f"{path} cannot be used: {error}.") from error
    _choose_attention(path, config, model_class, on_gpu=on_gpu, say=say)
    return config


def _check(config: Any, manifest: Manifest, max_layers: int) -> None:  # noqa: ANN401 - transformers is untyped
    """Raises ValueError for a value that would fail, or mean nothing, at the first token."""
    if config.is_encoder_decoder:
        raise ValueError("is_encoder_decoder is set, and the model has no encoder")
    text = config.get_text_config()
    num_layers = getattr(text, "num_hidden_layers", 0)
    if num_layers > max_layers:  # which transformers would begin to make, however many they are
        raise ValueError(f"num_hidden_layers is {num_layers}, and the trunk has {max_layers}")
    num_experts = min(layer.num_experts for layer in manifest.layers)
    said = {name: getattr(text, name, None) for name in _EXPERTS_PER_TOKEN}
    name, value = next(((n, v) for n, v in said.items() if v is not None), ("", 0))
    if not name:
        raise ValueError("it does not say how many experts a token uses")
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int) or not 1 <= number <= num_experts:
            raise ValueError(
                f"{name} is {number!r}, and the pack has {num_experts} experts in a layer"
            )
    _check_groups(text, num_experts)
    kinds = set(getattr(text, "layer_types", None) or ())
    for kind, name in (
        ("sliding_attention", "sliding_window"),
        ("chunked_attention", "attention_chunk_size"),
    ):
        window = getattr(text, name, None)
        if kind in kinds and window is None:
            raise ValueError(f"{name} is missing, and layer_types has {kind}")
        # Where no kinds are named, whether a window is set decides.
        if window is not None and (kind in kinds or not kinds) and not _is_positive(window):
            raise ValueError(f"{name} is {window!r}, and must be at least 1, or null for none")
    for rope in rope_kinds(text):
        for name in ("rope_theta", "factor"):
            _check_number(name, rope.get(name), least=math.ulp(0))
    for name in ("rms_norm_eps", "layer_norm_eps"):
        _check_number(name, getattr(text, name, None), least=0)
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if not isinstance(value := getattr(config, name, None), bool | None):
            raise ValueError(f"{name} is {value!r}, and must be true or false")


def _check_groups(text: Any, num_experts: int) -> None:  # noqa: ANN401 - transformers is untyped
    """Of experts, of which some routers choose the best first. Raises ValueError."""
    groups, chosen = getattr(text, "n_group", None), getattr(text, "topk_group", None)
    usual = type(text)()
    for name, value in (("n_group", groups), ("topk_group", chosen)):
        # Models that can do without have no groups unless told.
        if value is None and getattr(usual, name, None) is not None:
            raise ValueError(f"{name} is null")
    if groups is not None and (not _is_positive(groups) or num_experts % groups):
        raise ValueError(
            f"n_group is {groups!r}, and there are {num_experts} experts to be grouped"
        )
    if chosen is not None and groups is not None and not 1 <= chosen <= groups:
        raise ValueError(f"topk_group is {chosen!r}, and there are {groups} groups")


def _check_number(name: str, value: Any, *, least: float) -> None:  # noqa: ANN401 - of a file
    if value is not None and not (
        isinstance(value, int | float) and math.isfinite(value) and value >= least
    ):
        raise ValueError(f"{name} is {value!r}, and must be a number above 0")


def rope_kinds(text: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - transformers is untyped
    """How positions are turned into angles, by the configuration ``text``: for each kind of layer.

    What all share comes first.
    """
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [rope, *(each for each in rope.values() if isinstance(each, dict))]


def turning_points(text: Any) -> list[int]:  # noqa: ANN401 - transformers is untyped
    """Numbers of tokens past which all positions of a text have other angles (``longrope``).

    transformers chooses the angles by the largest position of a forward pass.
    """
    context = getattr(text, "max_position_embeddings", None)
    points = {
        kind["original_max_position_embeddings"]
        for kind in rope_kinds(text)
        if kind.get("rope_type") == "longrope" and "original_max_position_embeddings" in kind
    }
    return sorted(point for point in points if context is None or point < context)


def _is_positive(value: Any) -> bool:  # noqa: ANN401 - of a file
    return isinstance(value, int) and value >= 1


def _choose_attention(
    path: Path,
    config: Any,  # noqa: ANN401 - transformers is untyped
    model_class: Any,  # noqa: ANN401
    *,
    on_gpu: bool,
    say: Callable[[str], None],
) -> None:
    """Leaves the choice to transformers if the file's is not to be had here."""
    asked: Any = config._attn_implementation
    if asked is not None and not isinstance(asked, str):
        raise PackError(f"{path} cannot be used: attn_implementation is {asked!r}.")
    if asked is None or asked in _EVERYWHERE:
        return
    reason = "which is for GPUs"
    if on_gpu:
        try:
            with torch.device("meta"):
                model_class(config)
        except (ImportError, ValueError) as error:
            reason = f"which cannot be used here ({reason_of(error)})"
        else:
            return
    config._attn_implementation = None
    say(f"{path} asks for attention by {asked}, {reason}; computing with PyTorch's instead")


def context_tokens(config: Any) -> int | None:  # noqa: ANN401 - transformers is untyped
    """How long a sequence the model goes, prompt included; None if it does not say.

    Angles that are stretched by a factor (YaRN, LongRoPE, Llama 3's) reach that much further
    than the length that the model was trained with, whatever ``max_position_embeddings`` says.
    """
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if limit is None:
        return None
    for kind in rope_kinds(text):
        factor, original = kind.get("factor"), kind.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and isinstance(original, int):
            limit = max(limit, int(factor * original))
    return limit

"""How much memory keys and values take: arithmetic over a model's configuration."""

from typing import Any

CONTEXT_TOKENS = 8192
"""Of one sequence, for which room is kept where nobody says how long it will be."""


def kv_bytes_per_token(config: Any, value_bytes: int = 2) -> int:  # noqa: ANN401 - transformers'
    """Bytes of the keys and values of all layers for one token, at ``value_bytes`` a value."""
    text = config.get_text_config()
    layers = range(text.num_hidden_layers)
    # Gemma 4's layers differ, and its configuration tells sizes only layer by layer.
    own = getattr(text, "is_heterogeneous", False)
    return value_bytes * sum(_values(text.per_layer_config[i] if own else text) for i in layers)


def _values(layer: Any) -> int:  # noqa: ANN401 - transformers'
    """Keys and values of one token in a layer of that configuration."""
    if rank := getattr(layer, "kv_lora_rank", None):
        # Latent attention: what keys and values of all heads are made of, and a key's rotated part.
        return int(rank + layer.qk_rope_head_dim)
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(2 * heads * width)


def kv_bytes(config: Any, value_bytes: int = 2) -> int:  # noqa: ANN401 - transformers'
    """Bytes of one sequence's keys and values: as long as the model goes, to a limit.

    The limit is :data:`CONTEXT_TOKENS`.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or CONTEXT_TOKENS
    return min(longest, CONTEXT_TOKENS) * kv_bytes_per_token(config, value_bytes)

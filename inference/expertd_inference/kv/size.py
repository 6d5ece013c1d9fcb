"""How much memory keys and values take: arithmetic over a model's configuration."""

from typing import Any

CONTEXT_TOKENS = 8192
"""Of one sequence, for which room is kept where nobody says how long it will be."""


def kv_bytes_per_token(config: Any, value_bytes: int = 2) -> int:  # noqa: ANN401 - transformers'
    """Bytes of the keys and values of all layers for one token, at ``value_bytes`` a value."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    both = 2 * heads * width
    if rank := getattr(text, "kv_lora_rank", None):
        # Latent attention: what keys and values of all heads are made of, and a key's rotated part.
        both = rank + text.qk_rope_head_dim
    return int(both * value_bytes * text.num_hidden_layers)


def kv_bytes(config: Any, value_bytes: int = 2) -> int:  # noqa: ANN401 - transformers'
    """Bytes of one sequence's keys and values: as long as the model goes, to a limit.

    The limit is :data:`CONTEXT_TOKENS`.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or CONTEXT_TOKENS
    return min(longest, CONTEXT_TOKENS) * kv_bytes_per_token(config, value_bytes)

"""What keys and values take is what transformers' cache of a forward pass holds."""

import pytest
import torch

from expertd_inference.kv.size import CONTEXT_TOKENS, kv_bytes, kv_bytes_per_token
from expertd_inference.model.cache_name import CACHE
from expertd_testing.tiny_models import CONFIGS, make_model


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_bytes_of_a_token(architecture: str) -> None:
    model = make_model(architecture)
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        cache = model(input_ids=tokens, use_cache=True)[CACHE]
    held = sum(
        part.numel() * part.element_size()
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    )
    assert kv_bytes_per_token(model.config) * tokens.numel() == held
    assert kv_bytes_per_token(model.config, 4) == 2 * kv_bytes_per_token(model.config)


def test_as_long_as_the_model_goes_to_a_limit() -> None:
    short = make_model("mixtral", max_position_embeddings=100).config
    assert kv_bytes(short) == 100 * kv_bytes_per_token(short)
    short.max_position_embeddings = 10 * CONTEXT_TOKENS
    assert kv_bytes(short) == CONTEXT_TOKENS * kv_bytes_per_token(short)

"""A KV cache goes back to where it was before a step, whatever kind of cache it is."""

import pytest
import torch
from transformers import DynamicCache, GptOssConfig, StaticCache

from expertd_inference.device.kv_mark import KvMark

CONFIG = GptOssConfig(
    num_hidden_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention"],
)


def step(cache: DynamicCache | StaticCache, num_tokens: int, seed: int) -> list[torch.Tensor]:
    """One forward pass's keys and values, as attention would see them."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for layer in range(2):
        keys = torch.randn(1, 2, num_tokens, 8, generator=generator)
        seen += cache.update(keys, keys + 1, layer)
    return [tensor.clone() for tensor in seen]


@pytest.mark.parametrize("before", [0, 1, 4, 9])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "sliding"])
def test_a_step_is_undone(kind: str, num_tokens: int, before: int) -> None:
    cache = DynamicCache() if kind == "plain" else DynamicCache(config=CONFIG)
    for number in range(before):
        step(cache, 1, number)
    mark = KvMark(cache)
    first = step(cache, num_tokens, 100)
    for _ in range(2):
        mark.restore()
        assert cache.get_seq_length() == before
        again = step(cache, num_tokens, 100)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_step_that_stopped_half_way_is_undone() -> None:
    cache = DynamicCache(config=CONFIG)
    step(cache, 4, 0)
    mark = KvMark(cache)
    keys = torch.ones(1, 2, 1, 8)
    cache.update(keys, keys, 0)
    mark.restore()
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 4]


def test_without_a_cache_nothing_is_to_be_undone() -> None:
    mark = KvMark(None)
    assert mark.can_restore
    mark.restore()
    assert not KvMark(object()).can_restore

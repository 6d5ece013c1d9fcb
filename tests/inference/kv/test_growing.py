"""Keys and values in memory that grows are those of transformers' own cache."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from expertd_inference.kv import growing as kv_cache
from expertd_inference.kv.growing import GrowingLayer, growing


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, 2, tokens, 4, generator=generator),
        torch.randn(1, 2, tokens, 4, generator=generator),
    )


@pytest.mark.parametrize(
    "steps", [[1], [5, 1, 1], [3, 2, 1, 1, 1, 20, 1], [8, 1]], ids=str
)  # with room for 4 at least: within it, at its edge, past it, by one large piece
def test_it_holds_what_transformers_own_holds(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "MIN_TOKENS", 4)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for seed, tokens in enumerate(steps):
        for left, right in zip(
            ours.update(*states(tokens, seed)), theirs.update(*states(tokens, seed)), strict=True
        ):
            assert torch.equal(left, right)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_token_moves_nothing() -> None:
    layer = GrowingLayer()
    layer.update(*states(3, 0))
    before = layer.keys.data_ptr()
    for seed in range(20):
        layer.update(*states(1, seed))
    assert layer.keys.data_ptr() == before


@pytest.mark.parametrize("change", ["crop", "reset", "batch_repeat_interleave"])
def test_it_goes_on_after_others_changed_it(change: str) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(6, 0))
        if change == "crop":
            layer.crop(-2)
        elif change == "reset":
            layer.reset()
        else:
            layer.batch_repeat_interleave(2)
        new = states(2, 1)
        if change == "batch_repeat_interleave":
            new = new[0].repeat(2, 1, 1, 1), new[1].repeat(2, 1, 1, 1)
        layer.update(*new)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


def test_layers_with_a_window_stay() -> None:
    from transformers import GptOssConfig

    config = GptOssConfig(num_hidden_layers=4)
    cache = DynamicCache(config=config)
    kinds = [type(layer) for layer in cache.layers]
    assert DynamicLayer in kinds
    growing(cache)
    for before, layer in zip(kinds, cache.layers, strict=True):
        assert type(layer) is (GrowingLayer if before is DynamicLayer else before)
    lazy = DynamicCache()
    growing(lazy)
    lazy.update(*states(1, 0), 0)
    assert isinstance(lazy.layers[0], GrowingLayer)

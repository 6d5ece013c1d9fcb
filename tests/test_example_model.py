"""The example model: what its card promises, on a small part of the held-out text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.heldout import example_module

# torch's own, on the way to importing its quantization modules.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

HERE = Path(__file__).parent.parent / "examples/tiny-mixtral"
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """The first 1,024 tokens of the held-out text, behind its licence notice."""
    text = (HERE / "heldout.txt").read_text()
    text = text[text.index(SEPARATOR) :]
    ids = AutoTokenizer.from_pretrained(HERE)(text[:12_000]).input_ids
    return torch.tensor([ids[:1024]])


def test_it_loads_in_stock_transformers_and_is_small() -> None:
    assert (HERE / "model.safetensors").stat().st_size <= 32 << 20
    config = AutoModelForCausalLM.from_pretrained(HERE).config
    assert config.num_hidden_layers >= 6
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    for size in (config.hidden_size, config.intermediate_size, config.vocab_size):
        assert size % 128 == 0, "every scheme and kernel must apply"


def test_it_has_learned_the_language_and_its_routing(tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(HERE)
    with torch.no_grad():
        output = model(tokens, output_router_logits=True)
    loss = functional.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:])
    assert loss.exp() < 15, "a bigram model has 83"
    kept = []
    for logits in output.router_logits:
        chosen = functional.one_hot(logits.topk(2).indices, 8).sum(1).bool()
        kept.append((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum())
        assert chosen.any(0).all(), "an expert is never used"
    assert torch.stack(kept).mean() > 0.3, "uniform routing keeps a quarter"


# One window that is not full, full ones alone, and a last one of a single token.
@pytest.mark.parametrize("count", [2, 7, 9, 13, 14, 33])
def test_windows_score_each_token_once_from_half_a_context_or_more(count: int) -> None:
    tokens = np.arange(count)
    windows = list(example_module("scoring").windows(tokens, 8))
    assert np.concatenate([window.targets for window in windows]).tolist() == list(range(1, count))
    for number, window in enumerate(windows):
        assert len(window.ids) <= 8
        assert window.ids[window.fresh].tolist() == (window.targets - 1).tolist()
        assert number == 0 or len(window.ids) - len(window.targets) >= 4

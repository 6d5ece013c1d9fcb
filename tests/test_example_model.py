"""The example model: what its card promises, on a small part of the held-out text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

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

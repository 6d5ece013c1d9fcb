"""Llama 4, whose experts are outside of transformers' seam, and whose attention sees chunks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.experts.call import experts_asked_of
from expertd_inference.experts.keeping import KeptExperts, keeping
from expertd_inference.fewer_experts import FewerExperts
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_testing.tiny_models import randomize, save_model
from tests.architectures.batches import batched_model, compare
from tests.architectures.parity import load, logits
from tests.architectures.tiny_configs import tiny_config
from tests.inference.greedy import greedy, prompt_of

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}
PROMPT = prompt_of(40, seed=1)


def made(model: Any) -> Any:
    # Not cast afterwards, as angles would be, too.
    randomize(model, seed=0)
    return model.eval()


@pytest.mark.parametrize("top_k", [1, 2])
def test_is_stock(top_k: int, tmp_path: Path) -> None:
    config = tiny_config("llama4_text", num_experts_per_tok=top_k)
    theirs = made(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    save_model(theirs, tmp_path / "c")
    pack(Request(tmp_path / "c", tmp_path / "bf16", choose_scheme("bf16")))
    ours = load(tmp_path / "bf16")
    assert torch.equal(logits(ours, PROMPT), logits(theirs, PROMPT))
    tokens = greedy(ours, PROMPT, 16)
    assert tokens == greedy(theirs, PROMPT, 16)
    assert len(set(tokens)) > 4
    if top_k == 2:
        fewer = KeptExperts([(FewerExperts(most=1), len(PROMPT))], torch.device("cpu"))
        with keeping(fewer):
            kept = logits(ours, PROMPT)
        one = AutoModelForCausalLM.from_pretrained(
            tmp_path / "c", dtype=torch.bfloat16, num_experts_per_tok=1
        )
        assert torch.equal(kept, logits(one, PROMPT))


class Counted:
    """A runner that counts the rows that experts compute."""

    rows = 0

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def run(self, call: Any) -> Any:
        Counted.rows += len(call.routed)
        return self._runner.run(call)


@pytest.mark.skipif(native_library().library is None, reason="no native kernels")
def test_as_it_is_published_each_row_by_its_own_experts(tmp_path: Path) -> None:
    """With a vision part, which is left out."""
    text = tiny_config("llama4_text")
    config = Llama4Config(text_config=text.to_dict(), vision_config=VISION)
    model = Llama4ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    save_model(made(model), tmp_path / "c")
    said: list[str] = []
    request = Request(tmp_path / "c", tmp_path / "p", choose_scheme("4bit-fast"), optimize=False)
    pack(request, on_notice=said.append)
    assert "tensors that Llama4ForCausalLM has no place for are left out" in said[0]
    native = load(tmp_path / "p", torch.float32, NativeKernels())
    assert type(native) is Llama4ForCausalLM
    expected = logits(load(tmp_path / "p", torch.float32, ReferenceKernels()), PROMPT)
    with experts_asked_of(native, lambda seat: Counted(seat.runner)):  # type: ignore[arg-type, return-value]
        error = (logits(native, PROMPT) - expected).norm() / expected.norm()
    assert error < 1e-5
    layers, chosen = len(text.moe_layers), text.num_experts_per_tok
    assert Counted.rows == layers * chosen * len(PROMPT), "stock computes all by all experts"


def test_sequences_are_computed_in_turns() -> None:
    executor, same = compare(batched_model("llama4_text"))
    assert same
    assert (executor.name, executor.reason) == ("turns", "its attention sees chunks")

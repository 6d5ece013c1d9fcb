"""Each architecture in each scheme: what stock transformers computes from the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_testing.tiny_models import CONFIGS, make_checkpoint, randomize, save_model
from expertstore.pack.manifest import Encoding, read_manifest
from tests.architectures.parity import fill, load, logits
from tests.architectures.tiny_configs import tiny_config
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]
SCHEMES = ["8bit", "4bit-fast", "paper-3bit", "paper-2bit"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_quantized_is_stock_on_the_dequantized(
    architecture: str, scheme: str, checkpoint: Make, packed: Make, stock: Make
) -> None:
    ours = load(packed(architecture, scheme))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.bfloat16)
    fill(theirs, packed(architecture, scheme), ours)
    prompt = prompt_of(30, seed=1)
    # The reference dequantizes and then does what stock does: not a bit may differ.
    assert torch.equal(logits(ours, prompt), logits(theirs, prompt))
    assert greedy(ours, prompt, 8) == greedy(theirs, prompt, 8)
    # And not by having ignored the quantization.
    assert not torch.equal(logits(ours, prompt), logits(stock(architecture), prompt))


def test_mxfp4_is_stocks(packed: Make, stock: Make) -> None:
    """transformers dequantizes to bfloat16, which holds every value of MXFP4."""
    path = packed("gpt_oss_mxfp4", "as-is")
    layout = read_manifest(path).manifest.layouts[0]
    assert {matrix.encoding for matrix in layout.matrices} == {Encoding.MXFP4}
    ours, theirs = load(path), stock("gpt_oss_mxfp4")
    prompt = prompt_of(40, seed=1)
    assert torch.equal(logits(ours, prompt), logits(theirs, prompt))
    tokens = greedy(ours, prompt, 32)
    assert tokens == greedy(theirs, prompt, 32)
    assert len(set(tokens)) > 8


needs_native = pytest.mark.skipif(
    native_library().library is None, reason="no native kernels: no compiler, or EXPERTD_NATIVE=0"
)


@needs_native
@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        *((architecture, "4bit-fast") for architecture in CONFIGS),
        *(("gpt_oss", scheme) for scheme in SCHEMES if scheme != "4bit-fast"),
        ("gpt_oss_mxfp4", "as-is"),
    ],
)
def test_native_kernels_say_what_the_reference_says(
    architecture: str, scheme: str, packed: Make
) -> None:
    """Experts and the quantized trunk; in float32, where no tie of a router is decided anew."""
    path, dtype = packed(architecture, scheme), torch.float32
    native = load(path, dtype, NativeKernels())
    reference = load(path, dtype, ReferenceKernels())
    prompt = prompt_of(30, seed=1)
    expected = logits(reference, prompt)
    # Sums of a few hundred products in another order, through three layers.
    error = (logits(native, prompt) - expected).norm() / expected.norm()
    assert error < 1e-5
    assert greedy(native, prompt, 8) == greedy(reference, prompt, 8)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_sharded_checkpoints(architecture: str, tmp_path: Path) -> None:
    """Experts of one layer lie in different files, and a fused tensor in one of its own."""
    source = make_checkpoint(architecture, tmp_path / "c", max_shard_size="400KB")
    assert len(list(source.glob("*.safetensors"))) > 5
    pack(Request(source, tmp_path / "p", choose_scheme("bf16")))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    prompt = prompt_of(30, seed=1)
    assert torch.equal(logits(load(tmp_path / "p"), prompt), logits(theirs, prompt))


def test_a_model_that_also_sees_is_served_as_a_language_model(tmp_path: Path) -> None:
    """Its layers under another name and a vision part, but nothing that prepares images."""
    text = tiny_config(
        "qwen3_5_moe_text",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    config = Qwen3_5MoeConfig(text_config=text.to_dict(), vision_config=vision)
    model = Qwen3_5MoeForConditionalGeneration(config)
    randomize(model, seed=0)
    save_model(model.to(torch.bfloat16), tmp_path / "c")
    said: list[str] = []
    pack(Request(tmp_path / "c", tmp_path / "p", choose_scheme("bf16")), on_notice=said.append)
    assert "has no preprocessor_config.json, without which images cannot be prepared" in said[0]
    assert "tensors that Qwen3_5MoeForCausalLM has no place for are left out" in said[1]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.bfloat16)
    prompt = prompt_of(30, seed=1)
    assert torch.equal(logits(load(tmp_path / "p"), prompt), logits(theirs, prompt))

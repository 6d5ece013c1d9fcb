"""Experts without a gate, and latent ones: Nemotron-H's, whose layers are of four kinds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.experts.cpu import experts_modules, layer_numbers
from expertd_inference.experts.routers import find_routers
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_testing.tiny_models import randomize, save_model
from expertstore.pack.manifest import read_manifest
from tests.architectures.batches import batched_model, compare
from tests.architectures.parity import load, logits
from tests.architectures.tiny_configs import tiny_config
from tests.inference.greedy import greedy, prompt_of

LATENT = 128


def packed(folder: Path, scheme: str, latent: int | None) -> Path:
    source = folder / "checkpoint"
    if not source.exists():
        config = tiny_config("nemotron_h", moe_latent_size=latent)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, seed=0)
        save_model(model.to(torch.bfloat16), source)
    pack(Request(source, folder / scheme, choose_scheme(scheme), optimize=False))
    return folder / scheme


@pytest.mark.parametrize("latent", [None, LATENT])
def test_is_stock(latent: int | None, tmp_path: Path) -> None:
    ours = load(packed(tmp_path, "bf16", latent))
    manifest = read_manifest(tmp_path / "bf16").manifest
    (layout,) = manifest.layouts
    width = latent or ours.config.hidden_size
    shapes = [(x.name, x.out_features, x.in_features) for x in layout.matrices]
    assert shapes == [("up", 128, width), ("down", width, 128)]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    prompt = prompt_of(40, seed=1)
    assert torch.equal(logits(ours, prompt), logits(theirs, prompt))
    tokens = greedy(ours, prompt, 16)
    assert tokens == greedy(theirs, prompt, 16)
    assert len(set(tokens)) > 4
    # What enters latent experts is not what their router is asked with.
    named = experts_modules(ours)
    experts = dict(zip(layer_numbers(list(named)), named.values(), strict=True))
    assert list(find_routers(ours, experts, manifest)) == ([] if latent else [1, 3])


@pytest.mark.skipif(native_library().library is None, reason="no native kernels")
def test_native_kernels_say_what_the_reference_says(tmp_path: Path) -> None:
    path = packed(tmp_path, "4bit-fast", LATENT)
    native = load(path, torch.float32, NativeKernels())
    prompt = prompt_of(30, seed=1)
    expected = logits(load(path, torch.float32, ReferenceKernels()), prompt)
    assert (logits(native, prompt) - expected).norm() / expected.norm() < 1e-5


def test_sequences_together_are_what_each_is_alone() -> None:
    executor, same = compare(batched_model("nemotron_h"))
    assert (executor.name, executor.recurrent, same) == ("modules", True, True)

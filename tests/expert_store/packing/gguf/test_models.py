"""Each architecture of llama.cpp that is read: the model that its converter was given."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.gguf.configs import make_config
from expertd.packing.gguf.folder import unfold
from expertd.packing.gguf.model_file import read_model
from expertstore.errors import CheckpointError
from expertstore.pack.manifest import GateOrder
from tests.gguf_files import MODELS, make_gguf_model, write_gguf


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_the_model_is_that_of_the_file(model_type: str, tmp_path: Path) -> None:
    """Weights in bfloat16, to the bit, and what the configuration makes of them."""
    layers = 4 if "linear" in str(MODELS[model_type]) else 2
    model = make_gguf_model(model_type, num_hidden_layers=layers)
    file = write_gguf(model, tmp_path / "model.gguf")
    unfold(file, tmp_path / "checkpoint")
    state = {}
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        assert (checkpoint.unused, checkpoint.dtype) == ([], "BF16")
        for name, tensor in checkpoint.trunk:
            state[name] = checkpoint.read(tensor).view(tensor.entry.shape)
        for module in checkpoint.architecture.experts:
            experts = [checkpoint.expert(module, number) for number in range(module.num_experts)]
            for leaf in ("gate_up", "down"):
                weights = torch.stack([getattr(each, leaf) for each in experts])
                biases = [getattr(each, f"{leaf}_bias") for each in experts]
                if leaf == "gate_up" and module.gate_order is GateOrder.INTERLEAVED:
                    weights = torch.stack(weights.chunk(2, dim=1), dim=2).flatten(1, 2)
                    gates = torch.stack(biases).chunk(2, dim=1)
                    biases = list(torch.stack(gates, dim=2).flatten(1, 2))
                state[module.parameter(f"{leaf}_proj")] = (
                    weights.transpose(1, 2) if module.is_transposed else weights
                )
                if module.has_bias:
                    state[module.parameter(f"{leaf}_proj_bias")] = torch.stack(biases)
        config = checkpoint.architecture.model.config
    expected = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    assert set(state) == set(expected) - tied
    for name, weight in state.items():
        # Of norms that have 1 added, and of logarithms, float32 keeps a little less.
        close = torch.allclose(weight.float(), expected[name].float(), rtol=1e-6, atol=1e-7)
        assert close, name
    prompt, found = torch.arange(40)[None], []
    for each, weights in ((config, {**expected, **state}), (model.config, expected)):
        each._attn_implementation = "eager"
        built = AutoModelForCausalLM.from_config(each, dtype=torch.float32).eval()
        built.load_state_dict(weights)
        with torch.no_grad():
            found.append(built(prompt).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_an_architecture_that_is_not_read(tmp_path: Path) -> None:
    model = make_gguf_model("mixtral", num_hidden_layers=1)
    file = write_gguf(model, tmp_path / "model.gguf")
    found = read_model(file)
    for name, message in (
        ("grok", "has llama.cpp's architecture grok, which is not read; read are deepseek2, "),
        ("qwen2moe", "has no experts; expertd serves Mixture"),
    ):
        metadata = {**found.metadata, "general.architecture": name}
        with pytest.raises(CheckpointError, match=message):
            make_config(type(found)(found.file, found.files, metadata, found.tensors))
    metadata = {**found.metadata, "llama.expert_count": "eight"}
    with pytest.raises(CheckpointError, match=r"has llama\.expert_count of another kind"):
        make_config(type(found)(found.file, found.files, metadata, found.tensors))

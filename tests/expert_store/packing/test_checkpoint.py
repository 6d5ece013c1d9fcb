"""Checkpoints: each expert as transformers itself would load it, and each flaw its sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from expertd.errors import CheckpointError
from expertd.pack.manifest import GateOrder
from expertd.packing.checkpoint import Checkpoint
from expertd.packing.plan import TrunkStep, make_plan
from expertd.packing.schemes import choose_scheme
from tests.expert_store.packing.conftest import MakeCheckpoint
from tests.tiny_models import CONFIGS, make_checkpoint, make_model, save_model

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_each_expert_is_what_transformers_loads(
    architecture: str, checkpoint_of: MakeCheckpoint
) -> None:
    path = checkpoint_of(architecture)
    state = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    with Checkpoint(path) as checkpoint:
        assert checkpoint.dtype == "BF16"
        assert not checkpoint.unused
        for module in checkpoint.architecture.experts:
            stock = {
                leaf: state[f"{module.name}.{leaf}"]
                for leaf in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
                if f"{module.name}.{leaf}" in state
            }
            assert module.num_experts == len(stock["gate_up_proj"])
            for expert in range(module.num_experts):
                found = checkpoint.expert(module, expert)
                gate_up, down = stock["gate_up_proj"][expert], stock["down_proj"][expert]
                if architecture == "gpt_oss":
                    assert module.gate_order is GateOrder.INTERLEAVED
                    bias = stock["gate_up_proj_bias"][expert]
                    assert found.gate_up_bias is not None
                    assert torch.equal(found.gate_up_bias, torch.cat((bias[0::2], bias[1::2])))
                    assert found.down_bias is not None
                    assert torch.equal(found.down_bias, stock["down_proj_bias"][expert])
                    gate_up, down = torch.cat((gate_up.T[0::2], gate_up.T[1::2])), down.T
                else:
                    assert found.gate_up_bias is found.down_bias is None
                assert torch.equal(found.gate_up, gate_up)
                assert torch.equal(found.down, down)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [("mixtral", [0, 1, 2]), ("qwen2_moe", [0, 2]), ("deepseek_v3", [1, 2])],
)
def test_dense_layers_have_no_experts(
    architecture: str, layers: list[int], checkpoint_of: MakeCheckpoint
) -> None:
    with Checkpoint(checkpoint_of(architecture)) as checkpoint:
        assert [module.layer for module in checkpoint.architecture.experts] == layers
        trunk = {source.name for _, source in checkpoint.trunk}
        assert not any(".experts." in name for name in trunk)
        assert ("model.layers.1.mlp.gate_proj.weight" in trunk) is (architecture == "qwen2_moe")


def test_shards_are_one_checkpoint(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    sharded = make_checkpoint("mixtral", tmp_path / "sharded", max_shard_size="600KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    with Checkpoint(sharded) as one, Checkpoint(checkpoint_of("mixtral")) as other:
        module = one.architecture.experts[1]
        assert torch.equal(one.expert(module, 3).gate_up, other.expert(module, 3).gate_up)
        assert [name for name, _ in one.trunk] == [name for name, _ in other.trunk]
        (sharded / "model-00002-of-00006.safetensors").unlink(missing_ok=True)
    for file in sorted(sharded.glob("*.safetensors"))[2:3]:
        file.unlink()
    with pytest.raises(CheckpointError, match="which its index names"):
        Checkpoint(sharded)


def test_one_expert_is_not_mistaken_for_a_fused_tensor(tmp_path: Path) -> None:
    path = make_checkpoint(
        "mixtral", tmp_path / "one", num_local_experts=1, num_experts_per_tok=1,
        num_hidden_layers=1,
    )  # fmt: skip
    with Checkpoint(path) as checkpoint:
        assert checkpoint.expert(checkpoint.architecture.experts[0], 0).down.shape == (128, 256)


def test_float32_becomes_bfloat16(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path / "fp32", dtype=torch.float32)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.dtype == "BF16"
        module = checkpoint.architecture.experts[0]
        assert checkpoint.expert(module, 0).down.dtype == torch.bfloat16
        plan = make_plan(checkpoint, choose_scheme("bf16"))
        types = {s.source.name: s.dtype for s in plan.steps if isinstance(s, TrunkStep)}
    # As when transformers loads it in bfloat16: the routers' corrections stay exact.
    wide = {name for name, dtype in types.items() if dtype == "F32"}
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}


def test_float16_stays(tmp_path: Path) -> None:
    path = make_checkpoint("olmoe", tmp_path / "fp16", dtype=torch.float16, num_hidden_layers=1)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.dtype == "F16"


def test_tensors_without_a_place_are_left_out(
    tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    """DeepSeek-V3 ships a layer for multi-token prediction, which transformers ignores."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.9.mlp.experts.0.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.9.eh_proj.weight"] = torch.zeros(2, 2)

    path = edited(checkpoint_of("deepseek_v3"), tmp_path, add)
    with Checkpoint(path) as checkpoint:
        assert sorted(checkpoint.unused) == [
            "model.layers.9.eh_proj.weight",
            "model.layers.9.mlp.experts.0.up_proj.weight",
        ]


def test_a_change_of_the_source_is_seen(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, lambda _: None)

    def fingerprint() -> str:
        with Checkpoint(path) as checkpoint:
            return checkpoint.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] += 1
    save_file(tensors, path / WEIGHTS)
    second = fingerprint()
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert len({first, second, fingerprint()}) == 3


def edited(source: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    path = tmp_path / "edited"
    shutil.copytree(source, path)
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    return path


EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), "lacks experts.5.w3.weight of layer 1.* for 7 of 8 experts"),
        (lambda t: t.pop("model.norm.weight"), "lacks the weights of model.norm.weight"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.2.block_sparse_moe.exp" in name],
            "lacks the weights of model.layers.2.mlp.experts.gate_up_proj",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64)}),
            r"has model.norm.weight in the shape \[64\], and its config.json asks for \[128\]",
        ),
    ],
)
def test_incomplete_checkpoints(
    tmp_path: Path, checkpoint_of: MakeCheckpoint, change: Any, message: str
) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value)


def test_an_expert_of_another_shape(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    path = edited(
        checkpoint_of("mixtral"), tmp_path, lambda t: t.update({EXPERT: torch.zeros(128, 128)})
    )
    with Checkpoint(path) as checkpoint:
        module = checkpoint.architecture.experts[1]
        checkpoint.expert(module, 4)
        with pytest.raises(CheckpointError, match=r"of expert 5 in the shape \[384, 128\]"):
            checkpoint.expert(module, 5)


def test_a_truncated_shard(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, lambda _: None)
    with (path / WEIGHTS).open("r+b") as file:
        file.truncate(1_000_000)
    with Checkpoint(path) as checkpoint:
        module = checkpoint.architecture.experts[-1]
        with pytest.raises(CheckpointError, match=r"is truncated: model\.layers"):
            checkpoint.expert(module, module.num_experts - 1)
    (path / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint(path)


def write_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **changes}))


def test_no_checkpoint_at_all(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        Checkpoint(tmp_path)
    shutil.copy(checkpoint_of("mixtral") / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint(tmp_path)
    write_config(tmp_path, model_type="frobnicate", architectures=["FrobnicateForCausalLM"])
    with pytest.raises(CheckpointError, match="FrobnicateForCausalLM, which transformers"):
        Checkpoint(tmp_path)


SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
            "LlamaForCausalLM, which has no experts",
        ),
        (
            JetMoeConfig(**SMALL, kv_channels=32, num_key_value_heads=2, num_local_experts=2),
            "JetMoeForCausalLM, whose experts are outside of transformers' experts interface",
        ),
        (
            Llama4TextConfig(**SMALL, num_key_value_heads=2, num_local_experts=2),
            "Llama4ForCausalLM, whose experts are outside of transformers' experts interface",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_architectures_without_the_seam(
    tmp_path: Path, config: PreTrainedConfig, message: str
) -> None:
    config.architectures = [message.split(",")[0]]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_types_that_cannot_be_packed(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    path = edited(
        checkpoint_of("mixtral"),
        tmp_path,
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
    )
    with Checkpoint(path) as checkpoint:
        module = checkpoint.architecture.experts[1]
        with pytest.raises(CheckpointError, match="has the type F8_E4M3, which cannot be packed"):
            checkpoint.expert(module, 5)


def test_a_scheme_that_does_not_fit(tmp_path: Path) -> None:
    model = make_model("mixtral", intermediate_size=96, num_hidden_layers=1)
    save_model(model, tmp_path / "odd")
    with Checkpoint(tmp_path / "odd") as checkpoint:
        with pytest.raises(
            CheckpointError,
            match="experts of layer 0 cannot be written as 4g64: the group size 64 does not "
            "divide the 96 inputs of down; choose another precision with --experts",
        ):
            make_plan(checkpoint, choose_scheme("4bit"))
        make_plan(checkpoint, choose_scheme("4bit", experts="4g32"))

"""Checkpoints: each expert as transformers itself would load it, and each flaw its sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    JetMoeConfig,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.default_scheme import default_scheme
from expertd.packing.plan import TrunkStep, make_plan
from expertd.packing.schemes import choose_scheme
from expertd_testing.tiny_models import CONFIGS, make_checkpoint, make_model, save_model
from expertstore.errors import CheckpointError
from expertstore.pack.manifest import GateOrder
from tests.expert_store.packing.conftest import MakeCheckpoint
from tests.expert_store.packing.editing import WEIGHTS, edited, write_config, write_shards


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
        # Which scales and zeros are found for, and which is rounded where it is not quantized.
        assert checkpoint.expert(module, 0).down.dtype == torch.float32
        plan = make_plan(checkpoint, choose_scheme("bf16"))
        types = {s.source.name: s.dtype for s in plan.steps if isinstance(s, TrunkStep)}
    # As when transformers loads it in bfloat16: the routers' corrections stay exact, and since
    # 5.24 their weights.
    wide = {name for name, dtype in types.items() if dtype == "F32"}
    kept = DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict
    assert wide == {name for name in types if any(name.endswith(part) for part in kept)}
    assert len(wide) == 2 * len(kept)


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


EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ({EXPERT: torch.float16}, "BF16"),
        ({NORM: torch.float16}, "BF16"),
        ({"": torch.float16}, "F16"),
        ({"": torch.float16, NORM: torch.float32}, "F16"),
        ({"": torch.float16, NORM: torch.bfloat16}, "BF16"),
        ({"": torch.float16, EXPERT: torch.float32}, "BF16"),
        ({"": torch.float32, EXPERT: torch.float16}, "BF16"),
        ({"": torch.float64}, "BF16"),
    ],
    ids=str,
)
def test_the_type_that_has_the_range_of_all(
    types: dict[str, torch.dtype], dtype: str, tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for start, kind in types.items():
            for name in [name for name in tensors if name.startswith(start)]:
                tensors[name] = tensors[name].to(kind)

    with Checkpoint(edited(checkpoint_of("mixtral"), tmp_path, change)) as checkpoint:
        assert checkpoint.dtype == dtype
        module = checkpoint.architecture.experts[1]
        own = types.get(EXPERT, types.get("", torch.bfloat16))
        usual = types.get("", torch.bfloat16)
        widest = torch.promote_types(own, usual)  # gate and up are one matrix
        assert checkpoint.expert(module, 5).gate_up.dtype == widest
        assert checkpoint.expert(module, 4).gate_up.dtype == usual


def test_a_tied_head_under_either_name(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "m", tie_word_embeddings=True, num_hidden_layers=1)
    tensors = load_file(path / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, path / WEIGHTS, {"format": "pt"})
        with Checkpoint(path) as checkpoint:
            assert name in {source.name for _, source in checkpoint.trunk}
        tensors["model.embed_tokens.weight"] = tensors.pop(name)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weights of model\.embed_tokens\.weight"):
        Checkpoint(path)


def test_buffers_that_old_checkpoints_lack(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    path = edited(checkpoint_of("deepseek_v3"), tmp_path, lambda t: t.pop(name))
    with Checkpoint(path) as checkpoint:
        assert checkpoint.unfilled == [name]
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    write_shards(path, {"a.safetensors": tensors}, **{name: "a.safetensors"})
    with pytest.raises(CheckpointError, match=f"and the tensor {name}, which its index names"):
        Checkpoint(path)


def test_more_experts_than_the_configuration_has(
    tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    """transformers would stack nine, and refuse the shape."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("w1", "w2", "w3"):
            stem = "model.layers.1.block_sparse_moe.experts"
            tensors[f"{stem}.8.{end}.weight"] = tensors[f"{stem}.7.{end}.weight"].clone()

    path = edited(checkpoint_of("mixtral"), tmp_path, add)
    with pytest.raises(CheckpointError, match=r"has 9 experts in layer 1.* asks for 8; give the"):
        Checkpoint(path)
    path = make_checkpoint("gpt_oss", tmp_path / "fused", num_hidden_layers=1)
    write_config(path, num_local_experts=6)
    with pytest.raises(CheckpointError, match=r"the shape \[8(, \d+)*\], .* asks for \[6"):
        Checkpoint(path)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "asks for 9 experts per token .* which has 8"),
        ("mixtral", {"num_experts_per_tok": 0}, "does not say how many experts a token uses"),
        ("deepseek_v3", {"n_group": 3}, "2 experts per token out of 1 of 3 groups"),
        ("deepseek_v3", {"topk_group": 3}, "out of 3 of 2 groups"),
        ("deepseek_v3", {"n_group": 8, "num_experts_per_tok": 4}, "4 experts .* out of 1 of 8"),
        ("mixtral", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "cannot build"),
        ("mixtral", {"pad_token_id": 999}, "cannot build as a language model"),
        ("mixtral", {"architectures": "Mixtral", "hidden_act": "nope"}, "cannot build"),
        ("mixtral", {"num_attention_heads": 0}, "cannot build"),
        ("mixtral", {"quantization_config": "x"}, "quantization_config is 'x', and must be an ob"),
    ],
)
def test_configurations_that_cannot_work(
    architecture: str,
    config: dict[str, Any],
    message: str,
    tmp_path: Path,
    checkpoint_of: MakeCheckpoint,
) -> None:
    """Told before anything is packed."""
    path = tmp_path / "c"
    path.mkdir()
    shutil.copy(checkpoint_of(architecture) / "config.json", path)
    write_config(path, **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value)


def test_16_bits_that_are_said_to_be_mxfp4(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    """As fine-tuning leaves GPT-OSS; transformers loads what is there."""
    path = edited(checkpoint_of("gpt_oss"), tmp_path, lambda _: None)
    write_config(path, quantization_config={"quant_method": "mxfp4"})
    assert default_scheme(path) == "4bit"
    with Checkpoint(path) as checkpoint:
        assert checkpoint.disagrees == "mxfp4"
        make_plan(checkpoint, choose_scheme("4bit"))


def test_infinity_in_the_configuration(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, lambda _: None)
    write_config(path, made_up=[float("inf"), float("nan")])
    with Checkpoint(path) as checkpoint:
        assert checkpoint.architecture.name == "MixtralForCausalLM"


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), "lacks experts.5.w3.weight of layer 1 .* for 7 of 8 experts"),
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
    """Of one expert or of all: told from the headers, before anything is packed."""
    path = edited(
        checkpoint_of("mixtral"), tmp_path, lambda t: t.update({EXPERT: torch.zeros(128, 128)})
    )
    with pytest.raises(CheckpointError, match=r"5.w3.weight in the shape \[128, 128\], and .*256"):
        Checkpoint(path)
    write_config(path, intermediate_size=128)
    tensors = load_file(path / WEIGHTS)
    tensors[EXPERT] = torch.zeros(256, 128)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj of each expert .* \[512, 128\], and .* \[256, 128\]"
    ):
        Checkpoint(path)


def test_a_truncated_shard(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    path = edited(checkpoint_of("mixtral"), tmp_path, lambda _: None)
    num_bytes = (path / WEIGHTS).stat().st_size
    with Checkpoint(path) as checkpoint:
        with (path / WEIGHTS).open("r+b") as file:
            file.truncate(1_000_000)  # since then
        module = checkpoint.architecture.experts[-1]
        with pytest.raises(CheckpointError, match=r"is truncated: model\.layers"):
            checkpoint.expert(module, module.num_experts - 1)
    with pytest.raises(CheckpointError, match=rf"truncated: it has 1000000 of {num_bytes} bytes"):
        Checkpoint(path)
    (path / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint(path)


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
            r"JetMoeForCausalLM, whose experts \(JetMoeMoA, in model\.layers\.0\.self_attention\."
            r"experts\) are outside of transformers' experts interface; a transformers that lets "
            r"them be replaced \(use_experts_implementation on JetMoeMoA\) would help",
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


@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int8, torch.int16, torch.uint32,
     torch.int64, torch.complex64],
    ids=str,
)  # fmt: skip
def test_types_that_are_none_of_weights(
    dtype: torch.dtype, name: str, tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    path = edited(
        checkpoint_of("mixtral"), tmp_path, lambda t: t.update({name: torch.ones(128).to(dtype)})
    )
    with pytest.raises(CheckpointError, match=f"{name} in .* has the type .*, which cannot be pac"):
        Checkpoint(path)


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

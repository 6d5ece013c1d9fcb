"""FP8 with a scale per block: packed as the 16-bit weights that it stands for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd.packing.stored.unpacking import dequantized, unpack
from expertd.packing.stored.weight import Packing, StoredWeight, fp8_form
from expertd_testing.tiny_models import make_checkpoint
from expertstore.errors import CheckpointError

# Divides all sizes: transformers derives the block from the number of scales, and so places
# partial blocks elsewhere than the models' makers do.
BLOCK = (32, 64)
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
SCALE = "_scale_inv"


def num_blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK[0]), -(-shape[1] // BLOCK[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 whose linear layers, experts among them, are in FP8."""
    path = make_checkpoint("deepseek_v3", tmp_path_factory.mktemp("fp8") / "c")
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "_proj" in name and name.endswith(".weight")]:
        shape = tensors[name].shape
        noise = torch.randn(shape, generator=generator)
        tensors[name] = noise.clamp(-3, 3).mul(100).to(torch.float8_e4m3fn)
        scales = 0.5 + torch.rand(num_blocks(shape), generator=generator)
        tensors[name + SCALE] = scales / 100 / shape[1] ** 0.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return path


def edited(checkpoint: Path, path: Path, **changes: torch.Tensor | None) -> Path:
    """A copy whose tensors, by the ends of their names, are replaced or taken away."""
    tensors = load_file(checkpoint / "model.safetensors")
    for end, values in changes.items():
        name = f"{EXPERT}{end}"
        del tensors[name]
        if values is not None:
            tensors[name] = values
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text((checkpoint / "config.json").read_text())
    return path


@pytest.mark.filterwarnings("ignore")  # transformers has no FP8 on the CPU, and says so
def test_bits_of_transformers(checkpoint: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).state_dict()
    with Checkpoint(checkpoint) as ours:
        assert ours.dtype == "BF16"
        assert not ours.unused
        for module in ours.architecture.experts:
            for expert in range(module.num_experts):
                found = ours.expert(module, expert)
                for leaf, matrix in (("gate_up", found.gate_up), ("down", found.down)):
                    weight = dequantized(matrix).bfloat16()
                    assert torch.equal(weight, state[f"{module.name}.{leaf}_proj"][expert])
        for name, source in ours.trunk:
            values = ours.read(source)
            assert torch.equal(values.to(state[name].dtype), state[name]), name


@pytest.mark.parametrize("scheme", ["bf16", "4bit"])
def test_packs_hold_no_fp8(scheme: str, checkpoint: Path, tmp_path: Path) -> None:
    pack(Request(checkpoint, tmp_path / "p", choose_scheme(scheme), optimize=False))
    trunk = load_file(tmp_path / "p/trunk.safetensors")
    kinds = {values.dtype for values in trunk.values()}
    assert torch.bfloat16 in kinds
    assert kinds <= {torch.bfloat16, torch.float32, torch.float16, torch.uint8}
    assert not any(name.endswith(SCALE) for name in trunk)


@pytest.mark.parametrize(
    "shape",
    [(32, 64), (33, 65), (1, 1), (31, 63), (100, 200)],
    ids=["whole", "one more", "one", "one less", "several"],
)
def test_partial_blocks(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(num_blocks(shape), generator=generator)
    stored = StoredWeight("w", shape, Packing.FP8, {}, fp8_form(BLOCK))
    found = dequantized(unpack(stored, {"weight": weight, "scales": scales}))
    for row in range(0, shape[0], 7):
        for column in range(0, shape[1], 5):
            factor = scales[row // BLOCK[0], column // BLOCK[1]]
            assert found[row, column] == weight[row, column].float() * factor


def test_a_scale_that_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {EXPERT}_scale_inv"):
        Checkpoint(edited(checkpoint, tmp_path, _scale_inv=None))


@pytest.mark.parametrize(
    ("size", "told"), [([32, 64], "32 x 64"), ([0, 128], "128 x 128"), ("32x64", "128 x 128")]
)
def test_scales_that_no_block_size_gives(
    size: object, told: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = edited(checkpoint, tmp_path, _scale_inv=torch.ones(2, 3))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION | {"weight_block_size": size}
    (path / "config.json").write_text(json.dumps(config))
    message = rf"_scale_inv in the shape \[2, 3\] .* of \[128, 128\], which blocks of {told} do not"
    if size != [32, 64]:  # the first of all, which has another shape in such a model
        message = f"which blocks of {told} do not give"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path)


@pytest.mark.parametrize(
    ("end", "value", "name"),
    [("", "nan", EXPERT), (SCALE, "inf", f"{EXPERT}{SCALE}"), (SCALE, "1e38", "Exp")],
    ids=["weight", "scale", "product"],
)
def test_what_is_no_number_is_named(
    end: str, value: str, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (tmp_path / "c").mkdir()
    values = tensors[f"{EXPERT}{end}"].float()
    values.view(-1)[0] = float(value)
    values = values.to(tensors[f"{EXPERT}{end}"].dtype)
    path = edited(checkpoint, tmp_path / "c", **{end: values})
    for scheme in ("bf16", "4bit"):
        request = Request(path, tmp_path / scheme, choose_scheme(scheme), optimize=False)
        with pytest.raises(CheckpointError, match=f"^{name}.* (holds|than a number holds)"):
            pack(request)

"""The trunk: all of it, nothing else, and clear words where it cannot be had."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig
from xxhash import xxh3_64_hexdigest

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES
from expertd_inference import load_model
from expertd_inference.kernels.cpu.reference import linear
from expertd_inference.model.loading import load_trunk
from expertd_inference.model.quantizer import match_experts
from expertd_testing.daemon import serving
from expertd_testing.tiny_models import CONFIGS, make_checkpoint
from expertstore.errors import PackError
from expertstore.pack.codec import dequantize
from expertstore.pack.manifest import Manifest, read_manifest
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]


def manifest_of(pack: Path) -> Manifest:
    return read_manifest(pack).manifest


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_the_trunk_is_stocks(architecture: str, stock: Make, packed: Make) -> None:
    pack = packed(architecture)
    trunk = load_trunk(pack, manifest_of(pack))
    theirs = dict(stock(architecture).state_dict())
    ours = trunk.model.state_dict()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    left = theirs.keys() - ours.keys()
    assert left
    assert all(".experts." in name for name in left)
    for name, buffer in stock(architecture).named_buffers():
        assert torch.equal(trunk.model.get_buffer(name), buffer), name
    assert not any(parameter.is_meta for parameter in trunk.model.parameters())
    assert not trunk.model.training


def test_dtype(packed: Make) -> None:
    pack = packed("mixtral")
    assert load_trunk(pack, manifest_of(pack)).model.dtype == torch.bfloat16
    trunk = load_trunk(pack, manifest_of(pack), dtype=torch.float32)
    assert {parameter.dtype for parameter in trunk.model.parameters()} == {torch.float32}


def test_quantized_trunk_is_dequantized(packed: Make, stock: Make) -> None:
    pack = packed("mixtral", "bf16", None, "4g64m")
    manifest = manifest_of(pack)
    names = [tensor.name for tensor in manifest.trunk_quantized]
    assert "model.layers.0.self_attn.q_proj.weight" in names
    ours = load_trunk(pack, manifest).model.state_dict()
    theirs = stock("mixtral").state_dict()
    parts = load_file(pack / manifest.trunk.name)
    for tensor in manifest.trunk_quantized:
        expected = dequantize(tensor.matrix, parts, torch.bfloat16)
        assert torch.equal(ours[tensor.name], expected)
        error = (ours[tensor.name] - theirs[tensor.name]).norm() / theirs[tensor.name].norm()
        assert 0.01 < error < 0.15, "4 bits with groups of 64 cost about a tenth"
    for name in ours.keys() - set(names):
        assert torch.equal(ours[name], theirs[name])


RSS_SCRIPT = """
import json, sys
from pathlib import Path
from expertstore.pack.manifest import read_manifest
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES
from expertd_inference import load_model
from expertd_inference.model.loading import load_trunk

def field(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

pack, small = map(Path, sys.argv[1:])
load_trunk(small, read_manifest(small).manifest)  # imports and caches
before = field("VmHWM")
trunk = load_trunk(pack, read_manifest(pack).manifest)
trunk.model.get_input_embeddings().weight.sum()
json.dump({"grown": field("VmHWM") - before}, sys.stdout)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of one layer of 8 experts of 6 MiB each, and a trunk of 0.3 MiB."""
    path = tmp_path_factory.mktemp("big")
    make_checkpoint("mixtral", path / "checkpoint", num_hidden_layers=1, intermediate_size=8192)
    pack(Request(path / "checkpoint", path / "pack", SCHEMES["bf16"]))
    assert manifest_of(path / "pack").expert_bytes == 48 << 20
    return path / "pack"


def test_loading_takes_no_memory_for_experts(packed: Make, big: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RSS_SCRIPT, big, packed("mixtral")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["grown"] < 9 << 20


def test_generating_takes_no_memory_for_experts(big: Path) -> None:
    with serving({"big": big}) as daemon:
        model = load_model("big", socket=daemon.socket)
        greedy(model, prompt_of(4), 2)
        before = private_bytes()
        greedy(model, prompt_of(200), 4)
        assert model.expertd.session.nvme_misses == 8, "it has used all experts"
        # Half of the experts' bytes. oneDNN keeps 0.4 MiB of code for each shape of a product that
        # it has met.
        assert private_bytes() - before < 24 << 20
        model.expertd.close()


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_generation_config_comes_along(packed: Make) -> None:
    pack = packed("example")
    model = load_trunk(pack, manifest_of(pack)).model
    assert model.generation_config.eos_token_id == 0
    assert model.name_or_path == str(pack)


def copy_of(pack: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pack, tmp_path / "pack")


def test_unknown_architecture(packed: Make) -> None:
    manifest = msgspec.structs.replace(
        manifest_of(packed("mixtral")), architecture="NoSuchForCausalLM"
    )
    with pytest.raises(PackError, match=r"has no NoSuchForCausalLM"):
        load_trunk(packed("mixtral"), manifest)


def test_no_architecture_at_all(packed: Make) -> None:
    # A name of transformers that is no model class.
    manifest = msgspec.structs.replace(manifest_of(packed("mixtral")), architecture="MixtralConfig")
    with pytest.raises(PackError, match=r"has no MixtralConfig"):
        load_trunk(packed("mixtral"), manifest)


def test_missing_weight_in_the_trunk(packed: Make, tmp_path: Path) -> None:
    pack = copy_of(packed("mixtral"), tmp_path)
    state = load_file(pack / "trunk.safetensors")
    del state["model.norm.weight"]
    save_file(state, pack / "trunk.safetensors")
    size = (pack / "trunk.safetensors").stat().st_size
    manifest = manifest_of(pack)
    manifest = msgspec.structs.replace(
        manifest,
        trunk=msgspec.structs.replace(manifest.trunk, num_bytes=size),
        trunk_checksum=xxh3_64_hexdigest((pack / "trunk.safetensors").read_bytes()),
    )
    with pytest.raises(PackError, match=r"model\.norm\.weight"):
        load_trunk(pack, manifest)


def test_truncated_trunk(packed: Make, tmp_path: Path) -> None:
    pack = copy_of(packed("mixtral"), tmp_path)
    with (pack / "trunk.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PackError, match="full size"):
        load_trunk(pack, manifest_of(pack))


def test_damaged_trunk(packed: Make, tmp_path: Path) -> None:
    pack = copy_of(packed("mixtral"), tmp_path)
    with (pack / "trunk.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)
    with pytest.raises(PackError, match="cannot be read"):
        load_trunk(pack, manifest_of(pack))


@pytest.mark.parametrize("scheme", ["bf16", "4bit"])
def test_trunk_with_other_bytes(scheme: str, packed: Make, tmp_path: Path) -> None:
    """As a copy that was cut short leaves it, in a file that had its full size before."""
    pack = copy_of(packed("mixtral", scheme), tmp_path)
    with (pack / "trunk.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    for kernels in (None, linear):
        with pytest.raises(
            PackError, match=r"trunk\.safetensors is damaged: its checksum is wrong"
        ):
            load_trunk(pack, manifest_of(pack), linear=kernels)


def test_what_damage_brings_about_is_not_blamed(packed: Make, tmp_path: Path) -> None:
    pack = copy_of(packed("mixtral"), tmp_path)
    (pack / "config.json").write_text("{")
    with pytest.raises(PackError, match=r"config\.json"):
        load_trunk(pack, manifest_of(pack))
    data = bytearray((pack / "trunk.safetensors").read_bytes())
    data[-1] ^= 1
    (pack / "trunk.safetensors").write_bytes(data)
    with pytest.raises(PackError, match="checksum is wrong"):
        load_trunk(pack, manifest_of(pack))


def test_config_that_is_gone(packed: Make, tmp_path: Path) -> None:
    pack = copy_of(packed("mixtral"), tmp_path)
    (pack / "config.json").unlink()
    with pytest.raises(PackError, match=r"config\.json"):
        load_trunk(pack, manifest_of(pack))


def test_config_of_another_size(packed: Make, tmp_path: Path) -> None:
    pack = copy_of(packed("mixtral"), tmp_path)
    config = json.loads((pack / "config.json").read_text())
    (pack / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    with pytest.raises(PackError, match="8 experts in the pack and 4 in the model"):
        load_trunk(pack, manifest_of(pack))
    (pack / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(PackError, match="MoE layers"):
        load_trunk(pack, manifest_of(pack))
    (pack / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(PackError, match="does not fit"):
        load_trunk(pack, manifest_of(pack))


def test_architecture_that_the_seam_does_not_reach(packed: Make) -> None:
    manifest = msgspec.structs.replace(
        manifest_of(packed("mixtral")), architecture="DbrxForCausalLM"
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(num_hidden_layers=1))
        del model.model.layers[0].mlp.experts
    with pytest.raises(PackError, match="DbrxForCausalLM cannot be served"):
        match_experts(model, manifest)


def test_plain_weights_are_not_called_quantized(packed: Make) -> None:
    """Some models compute otherwise where they are told so, and stock is not."""
    pack = packed("mixtral", "4bit")
    plain = load_trunk(pack, manifest_of(pack)).model
    quantized = load_trunk(pack, manifest_of(pack), linear=linear).model
    for model, expected in ((plain, False), (quantized, True)):
        assert hasattr(model.config, "_is_quantized") is expected
        assert hasattr(model.model.layers[0].self_attn.config, "_is_quantized") is expected

"""Weights that are stored quantized are kept bit for bit, whoever packed them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expertd.packing.default_scheme import default_scheme
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import Precision, choose_scheme
from expertd.packing.synthetic import fill, plan_of
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_testing.tiny_models import make_checkpoint, randomize, save_model
from expertstore.pack.codec import TORCH_DTYPES, dequantize, record_parts
from expertstore.pack.layout import FIXED_FORMS, Encoding, matrix_parts
from expertstore.pack.manifest import read_manifest
from expertstore.pack.reader import PackReader
from expertstore.pack.verify import verify
from tests.architectures.parity import load, logits
from tests.architectures.tiny_configs import tiny_config
from tests.inference.greedy import prompt_of
from tests.stored_weights import DEEPSEEK_V4, KINDS, make_stored, store


@pytest.mark.parametrize("name", KINDS)
def test_it_is_kept(name: str, tmp_path: Path) -> None:
    """The pack's weights are those of the other library, and its model stock's with these."""
    stored, plain = make_stored(tmp_path, KINDS[name])
    assert default_scheme(stored) == "as-is"
    notices: list[str] = []
    pack(Request(stored, tmp_path / "p", choose_scheme("as-is")), on_notice=notices.append)
    assert not notices
    # What the configuration alone tells `expert-run advise` of the sizes.
    plan = plan_of(json.loads((stored / "config.json").read_text()), choose_scheme("as-is"))
    assert plan.layouts == read_manifest(tmp_path / "p").manifest.layouts
    assert plan.files[-1].num_bytes == (tmp_path / "p/trunk.safetensors").stat().st_size
    assert not verify(tmp_path / "p").damages
    tensors = load_file(plain / "model.safetensors")
    precision, scales = KINDS[name].form.split()
    with PackReader(tmp_path / "p") as reader:
        (layout,) = reader.manifest.layouts
        for matrix in layout.matrices:
            kind = matrix.encoding.value.replace("hqq", "")
            if kind in {"", "int"}:
                kind += f"{matrix.bits}g{matrix.group_size}"
            assert kind == precision
            assert layout.part(f"{matrix.name}.scale").dtype == scales
        for place in reader.places():
            parts = record_parts(reader.read_record(place.layer, place.expert), layout)
            stem = f"model.layers.{place.layer}.mlp.experts.{place.expert}"
            gate, up, down = (
                tensors[f"{stem}.{leaf}_proj.weight"] for leaf in ("gate", "up", "down")
            )
            for matrix, expected in (("gate_up", torch.cat((gate, up))), ("down", down)):
                weight = dequantize(layout.matrix(matrix), parts, torch.bfloat16)
                assert torch.equal(weight, expected)
        names = {tensor.name for tensor in reader.manifest.trunk_quantized}
        assert names == {name for name in tensors if ".self_attn." in name and "_proj" in name}
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    prompt = prompt_of(20, seed=1)
    assert torch.equal(logits(load(tmp_path / "p"), prompt), logits(theirs, prompt))
    if native_library().library is not None:
        native, reference = (
            logits(load(tmp_path / "p", torch.float32, kernels), prompt)
            for kernels in (NativeKernels(), ReferenceKernels())
        )
        assert (native - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("encoding", [encoding for encoding in Encoding if encoding != "hqq"])
def test_imagined_packs_have_weights_of_usual_size(encoding: Encoding) -> None:
    bits, size = FIXED_FORMS.get(encoding, (8, 128))
    if encoding is Encoding.PLAIN:
        bits = size = 0
    matrix = Precision(bits, size, encoding=encoding).matrix("w", 128, 256)
    parts = {
        name: torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        for name, shape, dtype in matrix_parts(matrix, "BF16")
    }
    fill(matrix, parts, 2.0, torch.Generator().manual_seed(0))
    weight = dequantize(matrix, parts, torch.float32)
    assert 0.65 < weight.std() * 256**0.5 / 2 < 1.5  # exponents are whole numbers


@pytest.mark.parametrize("kind", ["fp8-blocks", "fp8-tensor", "modelopt-nvfp4", "ct-int4"])
def test_all_experts_in_one_tensor(kind: str, tmp_path: Path) -> None:
    make_checkpoint("granitemoe", tmp_path / "plain", num_hidden_layers=1, num_local_experts=4)
    stored = store(tmp_path, {"linear.weight": KINDS[kind]})
    pack(Request(stored, tmp_path / "p", choose_scheme("as-is")))
    (layout,) = read_manifest(tmp_path / "p").manifest.layouts
    assert all(KINDS[kind].form.startswith(matrix.encoding) for matrix in layout.matrices)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    prompt = prompt_of(20, seed=1)
    assert torch.equal(logits(load(tmp_path / "p"), prompt), logits(theirs, prompt))


def test_deepseek_v4(tmp_path: Path) -> None:
    """Experts in e2m1, the rest in FP8, all scales exponents, under its makers' own names."""
    config = tiny_config("deepseek_v4", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=0)
    save_model(model.to(torch.bfloat16), tmp_path / "plain")
    stored = store(tmp_path, DEEPSEEK_V4)
    notices: list[str] = []
    pack(Request(stored, tmp_path / "p", choose_scheme("as-is")), on_notice=notices.append)
    grouped = (
        "layers.0.attn.wo_a.weight is stored quantized and is no linear layer: it stays in 16 "
    )
    assert notices == [f"model.{grouped}bits, and so do 1 more matrices of the trunk."]
    manifest = read_manifest(tmp_path / "p").manifest
    assert {matrix.encoding for matrix in manifest.layouts[0].matrices} == {Encoding.MXFP4}
    kinds = {tensor.matrix.encoding for tensor in manifest.trunk_quantized}
    assert kinds == {Encoding.FP8}
    names = {tensor.name.split(".")[-2] for tensor in manifest.trunk_quantized}
    assert {"wq_a", "wq_b", "wkv", "w1", "w2", "w3"} <= names
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    prompt = prompt_of(20, seed=1)
    expected = logits(theirs, prompt)
    assert torch.equal(logits(load(tmp_path / "p"), prompt), expected)
    # Its output in groups is no linear layer to replace.
    computed = logits(load(tmp_path / "p", torch.bfloat16, ReferenceKernels()), prompt)
    assert (computed - expected).norm() < 0.05 * expected.norm()

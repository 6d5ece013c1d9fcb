"""The trunk stays quantized where a kernel computes from it, and gives what it gave dequantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expertd.packing.quantizer import quantize
from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.cpu import reference
from expertd_inference.model.loading import load_trunk
from expertd_inference.model.quantized_linear import QuantizedLinear
from expertd_inference.model.quantizer import replace_linears
from expertd_inference.model.trunk import TrunkFile
from expertstore.errors import PackError
from expertstore.pack.codec import dequantize
from expertstore.pack.layout import Matrix
from expertstore.pack.manifest import Manifest, read_manifest

Make = Callable[..., Any]


def manifest_of(pack: Path) -> Manifest:
    return read_manifest(pack).manifest


def quantized_parts(matrix: Matrix, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(matrix.out_features, matrix.in_features, generator=generator)
    return quantize(weight, matrix, optimize=False)


def layer(precision: str = "4g64m", *, bias: bool = True) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantized layer of 128 inputs and 64 outputs, and the plain one with its weight."""
    matrix = parse_precision(precision).matrix("x.weight", 64, 128)
    parts = quantized_parts(matrix)
    plain = nn.Linear(128, 64, bias=bias)
    made = QuantizedLinear(plain, matrix)
    made.load(parts, reference.linear)
    plain.weight = nn.Parameter(dequantize(matrix, parts, torch.float32))
    return made, plain


@pytest.mark.parametrize("precision", ["8g128", "4g64", "4g64m", "3g64m", "2g16m"])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (0, 128)])
def test_a_layer_is_the_plain_one(precision: str, shape: tuple[int, ...]) -> None:
    ours, theirs = layer(precision)
    rows = torch.randn(shape)
    product = functional.linear(rows, theirs.weight)
    assert torch.equal(ours(rows), product + theirs.bias)
    assert torch.equal(ours.weight, theirs.weight)


def test_weights_of_unusual_size_have_other_scales() -> None:
    matrix = parse_precision("4g64").matrix("x.weight", 64, 128)
    parts = quantize(1e-7 * torch.randn(64, 128), matrix, optimize=False)
    assert parts["x.weight.scale"].dtype == torch.bfloat16
    made = QuantizedLinear(nn.Linear(128, 64, bias=False), matrix)
    made.load(parts, reference.linear)
    made.to(torch.float32)
    assert torch.equal(made.weight, dequantize(matrix, parts, torch.float32))
    with pytest.raises(PackError, match=r"x\.weight\.scale is missing .* or has another shape"):
        made.load({**parts, "x.weight.scale": parts["x.weight.scale"].float()}, reference.linear)


def test_casting_leaves_the_parts_types() -> None:
    ours, theirs = layer()
    before = {name: part.dtype for name, part in ours.quantized.parts.items()}
    assert torch.uint8 in before.values()
    assert torch.float16 in before.values()
    ours.to(torch.bfloat16)
    assert {name: part.dtype for name, part in ours.quantized.parts.items()} == before
    assert ours.bias.dtype == torch.bfloat16
    rows = torch.randn(2, 128, dtype=torch.bfloat16)
    expected = functional.linear(rows, theirs.weight.bfloat16()) + theirs.bias.bfloat16()
    assert torch.equal(ours(rows), expected)


def test_the_parts_go_where_the_model_goes() -> None:
    ours, _ = layer()
    ours.to("meta")
    assert {part.device.type for part in ours.quantized.parts.values()} == {"meta"}
    assert not [name for name in ours.state_dict() if name != "bias"]


def test_parts_that_do_not_fit() -> None:
    matrix = parse_precision("4g64").matrix("x.weight", 64, 128)
    with pytest.raises(PackError, match="does not fit"):
        QuantizedLinear(nn.Linear(128, 32), matrix)
    made = QuantizedLinear(nn.Linear(128, 64), matrix)
    with pytest.raises(AssertionError, match="never loaded"):
        made(torch.zeros(1, 128))
    parts = quantized_parts(matrix)
    with pytest.raises(PackError, match=r"x\.weight\.scale is missing"):
        made.load(parts | {"x.weight.scale": parts["x.weight.scale"][1:]}, reference.linear)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_quantized_trunk_gives_what_the_dequantized_gives(
    architecture: str, packed: Make
) -> None:
    pack = packed(architecture, "bf16", None, "4g64m")
    manifest = manifest_of(pack)
    ours = load_trunk(pack, manifest, linear=reference.linear).model
    theirs = load_trunk(pack, manifest).model
    modules = dict(theirs.named_modules())
    quantized = {name: m for name, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(quantized) == len(manifest.trunk_quantized)
    for name, module in quantized.items():
        rows = torch.randn(3, module.in_features, dtype=torch.bfloat16)
        expected = functional.linear(rows, modules[name].weight)
        if module.bias is not None:
            expected = expected + modules[name].bias
        assert torch.equal(module(rows), expected), name
    plain = ours.state_dict()
    for name, tensor in plain.items():
        assert torch.equal(tensor, theirs.state_dict()[name])
    assert len(plain) + len(manifest.trunk_quantized) == len(theirs.state_dict())


def test_a_quantized_trunk_lies_in_the_mapped_file(packed: Make) -> None:
    pack = packed("mixtral", "bf16", None, "4g64m")
    model = load_trunk(pack, manifest_of(pack), linear=reference.linear).model
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(pack / "trunk.safetensors"):
            mapped.append(range(*(int(address, 16) for address in fields[0].split("-"))))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for part in module.quantized.parts.values():
                assert any(part.data_ptr() in addresses for addresses in mapped)


def test_a_layer_that_is_not_linear(packed: Make) -> None:
    pack = packed("mixtral", "bf16", None, "4g64m")
    manifest = manifest_of(pack)
    model = load_trunk(pack, manifest).model
    model.model.layers[1].self_attn.k_proj = nn.Identity()
    with pytest.raises(PackError, match=r"no linear layer for .*k_proj\.weight"):
        replace_linears(model, manifest, TrunkFile(pack, manifest).names)


def test_a_part_that_is_not_in_the_trunk(packed: Make) -> None:
    pack = packed("mixtral", "bf16", None, "4g64m")
    other = manifest_of(packed("mixtral", "bf16", None, "4g64"))
    manifest = msgspec.structs.replace(other, trunk=manifest_of(pack).trunk)
    with pytest.raises(PackError, match=r"lacks model\.layers\.0.*\.scale; make the pack again"):
        TrunkFile(pack, manifest)

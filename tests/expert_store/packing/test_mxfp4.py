"""MXFP4: a pack has the values that transformers reads from the checkpoint, and loses none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

from expertd.cli.commands import app
from expertd.packing.default_scheme import default_scheme
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertstore.errors import CheckpointError
from expertstore.pack.codec import dequantize, record_parts
from expertstore.pack.inspect import inspect
from expertstore.pack.layout import Encoding
from expertstore.pack.reader import PackReader
from expertstore.pack.verify import verify
from tests.expert_store.packing.conftest import MakeCheckpoint
from tests.random_mxfp4 import make_mxfp4_checkpoint

LAYERS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mxfp4") / "checkpoint"
    # 160 and 96: matrices that are not square, with an odd number of groups.
    return make_mxfp4_checkpoint(
        path, num_hidden_layers=LAYERS, hidden_size=160, intermediate_size=96
    )


def theirs(path: Path, layer: int, leaf: str) -> Tensor:
    """What transformers makes of all experts' ``leaf``: [E, in, out]."""
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.{layer}.mlp.experts.{leaf}_proj"
    result: Tensor = convert_moe_packed_tensors(
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    )
    return result


def packed_weights(path: Path) -> dict[tuple[int, int, str], Tensor]:
    """By layer, expert and matrix, the pack's weights and biases in bfloat16."""
    weights = {}
    with PackReader(path) as reader:
        for place in reader.places():
            layout = reader.manifest.layouts[0]
            parts = record_parts(reader.read_record(place.layer, place.expert), layout)
            for matrix in layout.matrices:
                key = place.layer, place.expert, matrix.name
                weights[key] = dequantize(matrix, parts, torch.bfloat16)
                weights[*key[:2], f"{matrix.name}.bias"] = parts[f"{matrix.name}.bias"]
    return weights


@pytest.mark.parametrize("scheme", ["as-is", "bf16"])
def test_bits_of_transformers(scheme: str, checkpoint: Path, tmp_path: Path) -> None:
    notices: list[str] = []
    pack(Request(checkpoint, tmp_path / "p", choose_scheme(scheme)), on_notice=notices.append)
    assert not verify(tmp_path / "p").damages
    found = packed_weights(tmp_path / "p")
    tensors = load_file(checkpoint / "model.safetensors")
    for layer in range(LAYERS):
        gate_up, down = (theirs(checkpoint, layer, leaf) for leaf in ("gate_up", "down"))
        bias = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"]
        for expert in range(8):
            rows = gate_up[expert].T
            expected = torch.cat((rows[0::2], rows[1::2]))
            # As integers: -0 is not 0.
            assert torch.equal(
                found[layer, expert, "gate_up"].view(torch.int16), expected.view(torch.int16)
            )
            assert torch.equal(
                found[layer, expert, "down"].view(torch.int16),
                down[expert].T.contiguous().view(torch.int16),
            )
            ordered = torch.cat((bias[expert, 0::2], bias[expert, 1::2]))
            assert torch.equal(found[layer, expert, "gate_up.bias"], ordered)
    assert bool(notices) is (scheme == "bf16"), "who gives up on bits is told"
    inspection = inspect(tmp_path / "p")
    encodings = {m.encoding for m in inspection.manifest.layouts[0].matrices}
    if scheme == "as-is":
        assert encodings == {Encoding.MXFP4}
        parts = {part.name: part.dtype for part in inspection.manifest.layouts[0].parts}
        assert parts["gate_up.q"] == parts["gate_up.scale"] == "U8"
        assert inspection.manifest.dtype == parts["down.bias"] == "BF16"
    trunk = load_file(tmp_path / "p/trunk.safetensors")
    assert all(torch.equal(values, tensors[name]) for name, values in trunk.items())
    assert len(trunk) == len([name for name in tensors if ".experts." not in name])


def test_it_can_be_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    scheme = choose_scheme("as-is", experts="8g32")
    pack(Request(checkpoint, tmp_path / "p", scheme, optimize=False))
    found = packed_weights(tmp_path / "p")
    expected = theirs(checkpoint, 0, "down")[3].T.float()
    error = (found[0, 3, "down"].float() - expected).norm() / expected.norm()
    assert error < 0.006, "8 bits in groups of 32"


def test_who_names_no_scheme_keeps_it(
    checkpoint: Path, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    assert default_scheme(checkpoint) == "as-is"
    assert default_scheme(checkpoint_of("gpt_oss")) == "4bit"
    assert default_scheme(tmp_path) == "4bit"
    done = CliRunner().invoke(app, ["pack", str(checkpoint), str(tmp_path / "p")])
    assert done.exit_code == 0, done.output
    assert inspect(tmp_path / "p").manifest.scheme == "as-is"
    scheme = choose_scheme("4bit", experts="as-is")
    assert (str(scheme.experts), str(scheme.attention)) == ("as-is", "4g64")


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}_blocks"), f"lacks {DOWN}_blocks"),
        (lambda t: t.pop(f"{DOWN}_scales"), f"lacks {DOWN}_scales"),
        (
            lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:, :, :2].contiguous()}),
            rf"{DOWN}_scales in the shape \[8, 160, 2\], .* needs \[8, 160, 3\]",
        ),
        (
            lambda t: t[f"{DOWN}_scales"][7, 159].fill_(255),
            f"{DOWN}_scales holds NaN in expert 7",
        ),
    ],
    ids=["no blocks", "no scales", "another shape", "not a number"],
)
def test_damaged_checkpoints(
    change: Callable[[dict[str, Tensor]], object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = {
        name: values.clone() for name, values in load_file(checkpoint / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        pack(Request(tmp_path, tmp_path / "p", choose_scheme("as-is")))

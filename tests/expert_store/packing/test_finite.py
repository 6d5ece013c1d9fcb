"""Weights that are no numbers are told by their tensors, in every part of a model."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertd.packing.finite import flaw
from expertd.packing.packer import Progress, Request, pack
from expertd.packing.schemes import choose_scheme
from expertstore.errors import CheckpointError
from expertstore.pack.codec import dequantize, record_parts
from expertstore.pack.reader import PackReader
from tests.expert_store.packing.conftest import MakeCheckpoint
from tests.expert_store.packing.editing import WEIGHTS, edited
from tests.random_mxfp4 import make_mxfp4_checkpoint

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "source", "target", "what"),
    [
        ([1.0, NAN], torch.bfloat16, torch.bfloat16, "NaN"),
        ([1.0, -INF, 2.0], torch.float32, torch.float32, "infinity"),
        ([65504.0], torch.float32, torch.float16, ""),
        ([1.0, -65520.0], torch.float32, torch.float16, "6.55e+04, which is more than float16"),
        ([3.4e38], torch.float32, torch.bfloat16, "3.4e+38, which is more than bfloat16 holds"),
        ([1e-9, 0], torch.float32, torch.float16, "nothing above 1e-09, which float16 has no"),
        ([1e-9, 1], torch.float32, torch.float16, ""),
        ([0.0], torch.float32, torch.float16, ""),
        ([], torch.float32, torch.float16, ""),
        ([448.0, NAN], torch.float8_e4m3fn, torch.bfloat16, "NaN"),
        ([5], torch.int64, torch.bfloat16, ""),
    ],
)
def test_what_is_lost(
    values: list[float], source: torch.dtype, target: torch.dtype, what: str
) -> None:
    found = flaw(torch.tensor(values).to(source), target)
    assert found.startswith(what)
    assert bool(found) == bool(what)


PLACES = {
    "experts": "model.layers.1.block_sparse_moe.experts.5.w3.weight",
    "down": "model.layers.0.block_sparse_moe.experts.2.w2.weight",
    "router": "model.layers.0.block_sparse_moe.gate.weight",
    "norm": "model.norm.weight",
    "attention": "model.layers.1.self_attn.q_proj.weight",
    "embeddings": "model.embed_tokens.weight",
    "head": "lm_head.weight",
}


def poisoned(checkpoint: Path, tmp_path: Path, names: list[str], value: float) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name].view(-1)[5] = value

    return edited(checkpoint, tmp_path, change)


@pytest.mark.parametrize("scheme", ["bf16", "4bit-fast", "paper-2bit"])
@pytest.mark.parametrize("place", PLACES)
def test_every_tensor_is_looked_at(
    place: str, scheme: str, tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    name = PLACES[place]
    value = INF if place == "norm" else NAN
    source = poisoned(checkpoint_of("mixtral"), tmp_path, [name], value)
    request = Request(source, tmp_path / "p", choose_scheme(scheme), optimize=False)
    what = "infinity" if place == "norm" else "NaN"
    message = f"^{name} holds {what}; mend the checkpoint, or give --force"
    with pytest.raises(CheckpointError, match=message) as caught:
        pack(request)
    assert "are done and kept in" in str(caught.value)
    assert not request.destination.exists()


def test_force_packs_them_and_names_them(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    """Also after an interruption: a run that goes on names what an earlier one has packed."""
    names = sorted(PLACES.values())
    source = poisoned(checkpoint_of("mixtral"), tmp_path, names, NAN)
    scheme = choose_scheme("4bit")
    request = Request(source, tmp_path / "p", scheme, optimize=False, force=True)

    def stop(progress: Progress) -> None:
        if progress.done_steps == progress.total_steps - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(request, on_progress=stop)
    with pytest.raises(CheckpointError, match="holds NaN"):
        pack(Request(source, tmp_path / "p", scheme, optimize=False))
    notices: list[str] = []
    pack(request, on_notice=notices.append)
    assert notices[0].startswith("Going on after")
    assert sorted(notices[1:]) == [
        f"{name} holds NaN; it is packed so (--force)." for name in names
    ]
    with PackReader(request.destination) as reader:
        parts = record_parts(reader.read_record(1, 5), reader.manifest.layouts[0])
        weight = dequantize(reader.manifest.layouts[0].matrix("gate_up"), parts, torch.float32)
    assert weight.isnan().sum() == 64  # its group


def test_of_many_some_are_named(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    stem = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    names = [stem.format(layer, expert) for layer in range(3) for expert in range(8)]
    source = poisoned(checkpoint_of("mixtral"), tmp_path, names, INF)
    notices: list[str] = []
    request = Request(source, tmp_path / "p", choose_scheme("bf16"), force=True)
    pack(request, on_notice=notices.append)
    assert len(notices) == 21
    assert notices[-1] == "4 more tensors are not finite, and packed so (--force)."


@pytest.mark.parametrize("scheme", ["bf16", "as-is", "4bit"])
def test_of_all_experts_in_one_tensor_the_expert_is_named(scheme: str, tmp_path: Path) -> None:
    source = make_mxfp4_checkpoint(tmp_path / "m", num_hidden_layers=1)
    name = "model.layers.0.mlp.experts.down_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_scales"][3, 7] = 255
        tensors[f"{name}_bias"][3, 7] = INF

    source = edited(source, tmp_path, change)
    notices: list[str] = []
    chosen = choose_scheme(scheme, experts="4g32" if scheme == "4bit" else None)
    request = Request(source, tmp_path / "p", chosen, optimize=False, force=True)
    pack(request, on_notice=notices.append)
    told = [notice for notice in notices if "--force)" in notice]
    assert sorted(told) == [
        f"{name}_bias holds infinity in expert 3; it is packed so (--force).",
        f"{name}_scales holds NaN in expert 3; it is packed so (--force).",
    ]


def test_what_does_not_fit_the_models_type(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    """A float32 tensor of an F16 model, which runs in F16, and one that BF16 cannot hold."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        tensors["model.norm.weight"] = torch.full((128,), 1e5)

    source = edited(checkpoint_of("mixtral"), tmp_path, change)
    with pytest.raises(
        CheckpointError, match=r"norm.weight holds 1e.05, which is more than float16"
    ):
        pack(Request(source, tmp_path / "p", choose_scheme("bf16")))

    def wide(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].float()
        tensors[PLACES["experts"]][7, 7] = 3.4e38

    (tmp_path / "b").mkdir()
    source = edited(checkpoint_of("mixtral"), tmp_path / "b", wide)
    with pytest.raises(CheckpointError, match=r"w3.weight holds 3.4e.38, which is more than b"):
        pack(Request(source, tmp_path / "q", choose_scheme("bf16")))


@pytest.mark.parametrize("scheme", ["4bit", "8bit", "paper-2bit"])
@pytest.mark.parametrize("factor", [2.0**-14, 1e6])
def test_weights_of_unusual_size_survive(
    factor: float, scheme: str, tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if ".experts." in name or "_proj" in name:
                tensors[name] *= factor

    usual = checkpoint_of("mixtral")
    unusual = edited(usual, tmp_path, change)
    weights = []
    for name, source in (("usual", usual), ("unusual", unusual)):
        request = Request(source, tmp_path / name, choose_scheme(scheme), optimize=False)
        notices: list[str] = []
        pack(request, on_notice=notices.append)
        assert not notices
        with PackReader(request.destination) as reader:
            layout = reader.manifest.layouts[0]
            parts = record_parts(reader.read_record(1, 3), layout)
            found = [dequantize(matrix, parts, torch.float32) for matrix in layout.matrices]
            weights.append([each / factor if name == "unusual" else each for each in found])
    dtypes = {part.name: part.dtype for part in layout.parts}
    if (scheme, factor) == ("4bit", 1e6):  # 4e5 / 7 is near the end of fp16
        assert dtypes["down.scale"] == "BF16"
    for one, other in zip(*weights, strict=True):
        # Both are off from the same weights by as much.
        assert (one - other).norm() / one.norm() < {"8bit": 0.01, "4bit": 0.12}.get(scheme, 0.4)


def test_gate_and_up_need_not_be_of_one_size(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("w1.weight"):  # gate
                tensors[name] *= 2.0**-20

    source = edited(checkpoint_of("mixtral"), tmp_path, change)
    pack(Request(source, tmp_path / "p", choose_scheme("8bit"), optimize=False))
    with PackReader(tmp_path / "p") as reader:
        layout = reader.manifest.layouts[0]
        parts = record_parts(reader.read_record(1, 5), layout)
    name = PLACES["experts"].replace("w3", "w1")
    gate = load_file(source / WEIGHTS)[name].float()
    found = dequantize(layout.matrix("gate_up"), parts, torch.float32)[: len(gate)]
    assert (found - gate).norm() < 0.0065 * gate.norm()


def test_an_expert_far_larger_than_others(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    """The layer's scales are in fp16 by what the others are like, and cannot hold this one's."""
    name = PLACES["experts"]
    source = edited(checkpoint_of("mixtral"), tmp_path, lambda t: t[name].mul_(1e7))
    with pytest.raises(CheckpointError, match=r"Expert 5 of layer 1 cannot .* --experts 16 to"):
        pack(Request(source, tmp_path / "p", choose_scheme("4bit"), optimize=False, force=True))
    pack(Request(source, tmp_path / "p", choose_scheme("bf16")))


def test_side_files_are_looked_at_first(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    """A tokenizer that a cache lacks; a licence does not stop anybody."""
    source = edited(checkpoint_of("mixtral"), tmp_path, lambda _: None)
    (source / "LICENSE").symlink_to("absent")
    pack(Request(source, tmp_path / "p", choose_scheme("bf16")))
    assert not os.path.lexists(tmp_path / "p/LICENSE")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("../blobs/abc")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to \.\./blobs/abc"):
        pack(Request(source, tmp_path / "q", choose_scheme("bf16")))
    assert not (tmp_path / "q.partial").exists()

"""A pack of fewer experts computes what the whole one does, if the others were not used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.packing.pruning import prune
from expertd.traces.usage import Usage
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.experts.tracing import traced
from expertd_inference.model.loading import load_trunk
from expertstore.errors import InvalidInputError, PackError
from expertstore.pack.manifest import read_manifest
from expertstore.pack.verify import verify
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]
IDS = torch.tensor([[65, 200]])


def model_of(pack: Path) -> Any:
    source = PackSource(pack)
    trunk = load_trunk(source.pack, source.manifest, dtype=torch.float32)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery)
    return trunk.model


def usage_of(model: Any, num_experts: int, ids: torch.Tensor) -> Usage:
    layers = traced(model, lambda: model(ids))
    scores = [[0.0] * num_experts for _ in layers]
    for layer, of_layer in zip(layers, scores, strict=True):
        for expert, added in zip(layer.experts.flatten(), layer.added.flatten(), strict=True):
            of_layer[expert] += float(added)
    return Usage(tuple(each.layer for each in layers), tuple(map(tuple, scores)))


@pytest.mark.parametrize(
    ("architecture", "share", "num_tokens"),
    [("mixtral", 0.5, 2), ("gpt_oss", 0.5, 2), ("glm4_moe", 0.5, 2), ("deepseek_v3", 0.75, 1)],
)
@torch.no_grad()
def test_a_pruned_pack(
    architecture: str, share: float, num_tokens: int, packed: Make, tmp_path: Path
) -> None:
    pack = packed(architecture)
    whole = model_of(pack)
    before = read_manifest(pack).manifest
    num_experts = before.layers[0].num_experts
    ids = IDS[:, :num_tokens]
    usage = usage_of(whole, num_experts, ids)
    progress: list[tuple[int, int]] = []
    prune(pack, tmp_path / "few", usage, share, on_progress=lambda *done: progress.append(done))
    after = read_manifest(tmp_path / "few").manifest
    assert [layer.num_experts for layer in after.layers] == [share * num_experts] * len(
        after.layers
    )
    assert after.expert_bytes == share * before.expert_bytes == progress[-1][0] == progress[-1][1]
    assert not verify(tmp_path / "few").damages
    few = model_of(tmp_path / "few")
    assert torch.allclose(few(ids).logits, whole(ids).logits, atol=1e-4)
    # Of another text other experts would be used.
    assert not torch.allclose(few(IDS + 9).logits, whole(IDS + 9).logits, atol=1e-4)
    assert not (tmp_path / "few.partial").exists()


def test_what_cannot_be_pruned(packed: Make, tmp_path: Path) -> None:
    pack, few = packed("mixtral"), tmp_path / "few"
    usage = Usage((0, 1, 2), ((1.0,) * 8,) * 3)
    for share in (0.1, 1.0):
        with pytest.raises(InvalidInputError, match="a token uses 2; give"):
            prune(pack, few, usage, share)
    with pytest.raises(InvalidInputError, match="3 layers of 6 experts, and the pack 3"):
        prune(pack, few, Usage((0, 1, 2), ((1.0,) * 6,) * 3), 0.5)
    few.mkdir()
    with pytest.raises(PackError, match="exists already"):
        prune(pack, few, usage, 0.5)
    assert sorted(tmp_path.iterdir()) == [few], "nothing half-done"


def test_how_much_an_expert_adds(packed: Make) -> None:
    """The parts of a layer's output are what the layer gives, and their norms are told."""
    model = model_of(packed("mixtral"))
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    experts = model.model.layers[1].mlp.experts
    index, weights = torch.tensor([[0, 7], [3, 8], [2, 1]]), torch.full((3, 2), 0.5)
    whole = experts(rows, index, weights)
    given: list[torch.Tensor] = []
    (layer,) = traced(model, lambda: given.append(experts(rows, index, weights)))
    assert torch.allclose(given[0], whole, atol=1e-5)
    assert layer.layer == 1
    assert torch.equal(layer.experts, index)
    assert layer.added[1, 1] == 0, "8 is no expert"
    assert torch.allclose(layer.added[1, 0], whole[1].norm(), rtol=1e-4)

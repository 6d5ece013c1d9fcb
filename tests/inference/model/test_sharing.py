"""A fine-tune's pack has what its base has not, and gives the fine-tune's logits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd.packing.sharing import OWN_NAME, check_shareable, share_with
from expertstore.errors import PackError
from expertstore.pack.manifest import read_manifest
from expertstore.pack.verify import verify
from tests.inference.model.test_pruning import IDS, model_of

Make = Callable[..., Any]
CHANGED = {0: "w1", 5: "w2"}
"""By expert of layer 1: a matrix of it."""


@torch.no_grad()
def test_what_differs_is_its_own(checkpoint: Make, packed: Make, tmp_path: Path) -> None:
    base = packed("mixtral", "4bit")
    fine = shutil.copytree(checkpoint("mixtral"), tmp_path / "fine")
    (weights,) = fine.glob("*.safetensors")
    tensors = load_file(weights)
    for expert, name in CHANGED.items():
        (key,) = [x for x in tensors if "layers.1." in x and f"experts.{expert}.{name}." in x]
        tensors[key] = tensors[key] * 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    made = tmp_path / "made"
    check_shareable(base, made)
    pack(Request(fine, made, choose_scheme("4bit"), optimize=False))
    expected = model_of(made)(IDS).logits
    shared = share_with(made, base)
    assert (shared.num_shared, shared.num_own, shared.shares_trunk) == (22, 2, True)
    assert not verify(made).damages
    assert torch.equal(model_of(made)(IDS).logits, expected)
    record_bytes = read_manifest(made).manifest.max_record_bytes
    assert (made / OWN_NAME).stat().st_size <= 2 * record_bytes + 4096
    others = [file for file in made.glob("*.safetensors") if file.name != OWN_NAME]
    assert {file.stat().st_nlink for file in others} == {2}
    assert share_with(made, base) == shared, "a second time it is as it was"
    assert torch.equal(model_of(made)(IDS).logits, expected)
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
    with pytest.raises(PackError, match="pack both by one scheme"):
        share_with(made, packed("mixtral"))
    assert not verify(made).damages

"""What is in a pack, counted."""

import json
from pathlib import Path

import pytest

from expertstore.errors import PackError
from expertstore.pack.inspect import inspect
from expertstore.pack.tensor_file import build_header
from tests.expertstore.pack.conftest import EXPERTS, LAYERS, RECORD_BYTES


def test_weights_and_bits(pack: Path) -> None:
    tensors = [
        ("embed.weight", "BF16", (10, 4)),
        ("q.weight.q", "U8", (32, 64)),
        ("q.weight.scale", "F16", (64, 1)),
        ("q.weight.zero", "F16", (64, 1)),
    ]
    data = build_header(tensors) + bytes(80 + 2048 + 256)
    (pack / "trunk.safetensors").write_bytes(data)
    tree = json.loads((pack / "pack.json").read_bytes())
    tree["trunk"]["num_bytes"] = len(data)
    matrix = {"name": "q.weight", "encoding": "hqq", "out_features": 64, "in_features": 64,
              "bits": 4, "group_size": 64}  # fmt: skip
    tree["trunk_quantized"] = [{"name": "q.weight", "matrix": matrix, "dtype": "BF16"}]
    (pack / "pack.json").write_text(json.dumps(tree))
    found = inspect(pack)
    assert found.expert_weights == LAYERS * EXPERTS * RECORD_BYTES // 2
    assert found.expert_bits == 16
    assert found.trunk_weights == 40 + 64 * 64
    assert found.trunk_bits == 8 * len(data) / found.trunk_weights


def test_a_trunk_that_cannot_be_read(pack: Path) -> None:
    with pytest.raises(PackError, match="truncated"):
        inspect(pack)
    (pack / "trunk.safetensors").unlink()
    with pytest.raises(PackError, match="No such file"):
        inspect(pack)

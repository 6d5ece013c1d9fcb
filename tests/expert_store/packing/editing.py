"""Checkpoints that are not as they should be, made of sound ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edited(source: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    path = tmp_path / "edited"
    shutil.copytree(source, path)
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    return path


def write_config(path: Path, **changes: Any) -> None:
    """Replaces or adds values of the checkpoint's configuration, as Python writes JSON."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **changes}))


def write_shards(path: Path, shards: dict[str, dict[str, Tensor]], **index: str) -> None:
    """Writes each file of ``shards`` and an index; ``index`` changes where that has a tensor."""
    weight_map = {}
    for name, tensors in shards.items():
        file = path / name
        file.parent.mkdir(exist_ok=True)
        save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    weight_map |= index
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

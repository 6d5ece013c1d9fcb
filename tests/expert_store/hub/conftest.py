"""A hub on loopback that has a tiny model in several shards."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from expertd_testing.hub import Hub, serving_hub
from expertd_testing.tiny_models import make_checkpoint

NAME = "org/tiny"
NUM_SHARDS = 5


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, whose tensors lie in the order of their layers."""
    import json

    path = make_checkpoint("mixtral", tmp_path_factory.mktemp("sharded") / "tiny")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: ("layers" not in name, name))
    weight_map = {}
    for index in range(NUM_SHARDS):
        part = names[index * len(names) // NUM_SHARDS : (index + 1) * len(names) // NUM_SHARDS]
        shard = f"model-{1 + index:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the model as ``org/tiny``; its cache is the test's own."""
    with serving_hub() as hub:
        hub.repositories[NAME] = sharded
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        # huggingface_hub reads the environment once.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub

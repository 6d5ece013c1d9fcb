"""The same as of Hugging Face's hub, by ModelScope's API."""

from pathlib import Path

import pytest

from expertd.hub.modelscope import ModelScopeRepository
from expertd.hub.opening import cached_snapshot, open_repository
from expertd.hub.reference import parse_reference
from expertd_testing.hub import Hub
from expertstore.errors import CheckpointError
from tests.expert_store.hub.conftest import NAME

SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture(autouse=True)
def endpoint(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms-cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)


def opened(text: str = f"ms://{NAME}") -> ModelScopeRepository:
    reference = parse_reference(text)
    assert reference is not None
    assert cached_snapshot(reference) is None
    repository = open_repository(reference)
    assert isinstance(repository, ModelScopeRepository)
    return repository


def test_files_parts_and_downloads(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    repository = opened()
    assert set(repository.files) == {file.name for file in sharded.iterdir()}
    data = (sharded / SHARD).read_bytes()
    assert repository.files[SHARD].num_bytes == len(data)
    assert repository.read(SHARD, 100, 50) == data[100:150]
    came: list[int] = []
    file = repository.download(SHARD, tmp_path / "here", came.append)
    assert file == tmp_path / "here" / SHARD
    assert file.read_bytes() == data
    assert sum(came) == len(data)
    assert repository.cached(SHARD) is None
    assert opened("ms://org/tiny@v1").commit == repository.commit
    hub.has_ranges = False
    with pytest.raises(CheckpointError, match="does not send parts of files"):
        repository.read(SHARD, 100, 50)


def test_faults(hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="shows no ms://org/none: look at the name"):
        opened("ms://org/none")
    with pytest.raises(CheckpointError, match="shows no ms://org/tiny@v2"):
        opened("ms://org/tiny@v2")
    repository = opened()
    data = (sharded / SHARD).read_bytes()
    hub.replaced[SHARD] = data[:-1] + bytes([data[-1] ^ 1])
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(CheckpointError, match=f"{SHARD} of ms://org/tiny .* other bytes"):
        repository.download(SHARD, tmp_path / "here", lambda _: None)
    hub.token = "secret"
    hub.gated.add(NAME)
    with pytest.raises(CheckpointError, match="ModelScope forbids ms://org/tiny"):
        opened()
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert opened().read(SHARD, 0, 10) == data[:10]
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"could not be fetched from http://127\.0\.0\.1:9"):
        opened()

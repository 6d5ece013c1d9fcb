"""Against a hub on loopback that refuses, cuts off, and sends other bytes."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from expertd.hub import huggingface
from expertd.hub.huggingface import HuggingFaceRepository
from expertd.hub.opening import cached_snapshot, open_repository
from expertd.hub.reference import parse_reference
from expertd_testing.hub import COMMIT, Hub
from expertstore.errors import CheckpointError
from tests.expert_store.hub.conftest import NAME

SHARD = "model-00002-of-00005.safetensors"


def opened(text: str = NAME) -> HuggingFaceRepository:
    reference = parse_reference(text)
    assert reference is not None
    repository = open_repository(reference)
    assert isinstance(repository, HuggingFaceRepository)
    return repository


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second and more between its attempts."""
    monkeypatch.setattr("time.sleep", lambda _: None)


def test_files_and_parts(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    repository = opened()
    assert repository.commit == COMMIT
    assert set(repository.files) == {file.name for file in sharded.iterdir()}
    data = (sharded / SHARD).read_bytes()
    assert repository.files[SHARD].num_bytes == len(data)
    assert len(repository.files[SHARD].sha256) == 64
    assert not repository.files["config.json"].sha256
    assert repository.read(SHARD, 100, 50) == data[100:150]
    assert repository.read(SHARD, len(data) - 5, 50) == data[-5:]
    hub.has_ranges = False
    with pytest.raises(CheckpointError, match="does not send parts of files"):
        repository.read(SHARD, 100, 50)


def test_a_download_that_is_cut_off_goes_on(
    hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # kept in pieces of that
    data = (sharded / SHARD).read_bytes()
    hub.cuts[SHARD] += [1000, 20_000]
    hub.statuses[SHARD] += [429]
    came: list[int] = []
    file = opened().download(SHARD, tmp_path / "here", came.append)
    assert file.read_bytes() == data
    assert sum(came) == len(data)
    assert hub.sent[SHARD] == len(data), "nothing was sent twice"
    asked = len(hub.asked)
    assert opened().download(SHARD, tmp_path / "here", came.append) == file
    assert len(hub.asked) == asked


def test_other_bytes_are_fetched_again(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    data = (sharded / SHARD).read_bytes()
    hub.replaced[SHARD] = data[:-1] + b"!"
    repository = opened()
    with pytest.raises(CheckpointError, match=f"{SHARD} .* came 2 times with other bytes"):
        repository.download(SHARD, tmp_path / "here", lambda _: None)
    assert hub.asked.count(SHARD) == huggingface.NUM_ATTEMPTS
    del hub.replaced[SHARD]
    file = repository.download(SHARD, tmp_path / "here", lambda _: None)
    assert file.read_bytes() == data, "what was wrong is not taken for the file"


def test_who_is_let_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="shows no model org/none: look at the name"):
        opened("org/none")
    with pytest.raises(CheckpointError, match="org/tiny has no revision v2; give one of"):
        opened("org/tiny@v2")
    hub.token = "hf_secret"
    hub.gated.add(NAME)
    with pytest.raises(CheckpointError, match=f"is gated: accept its terms at {hub.url}/org/tiny"):
        opened()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert opened().commit == COMMIT
    hub.private.add(NAME)
    assert opened().commit == COMMIT


def test_a_hub_in_trouble(hub: Hub, tmp_path: Path) -> None:
    hub.statuses[""] += [500]
    with pytest.raises(CheckpointError, match="The hub answered 500 for hf://org/tiny"):
        opened()
    repository = opened()
    hub.statuses[SHARD] += [503] * 99
    with pytest.raises(CheckpointError, match=f"The hub answered 503 for {SHARD}"):
        repository.read(SHARD, 0, 10)
    hub.statuses[SHARD] = []
    hub.cuts[SHARD] += [0] * 99
    with pytest.raises(CheckpointError, match=r"could not be fetched from .*goes on where it was"):
        repository.download(SHARD, tmp_path / "here", lambda _: None)


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="hf://org/tiny could not be fetched from http"):
        opened()


def test_the_cache(
    hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = opened()
    reference = repository.reference
    assert repository.cached(SHARD) is None
    assert cached_snapshot(reference) is None, "the hub can be asked"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"not in the cache .* HF_HUB_OFFLINE forbids"):
        cached_snapshot(reference)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        opened()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    file = repository.download(SHARD, None, lambda _: None)
    repository.download("config.json", None, lambda _: None)
    cached = repository.cached(SHARD)
    assert cached == file
    assert cached.read_bytes() == (sharded / SHARD).read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cached_snapshot(reference)
    assert snapshot is not None
    assert (snapshot / SHARD).samefile(file)

"""A checkpoint whose shards come one by one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from expertd.hub.folder import NUM_AHEAD, HubFolder
from expertd.hub.huggingface import HuggingFaceRepository
from expertd.hub.reference import HubReference
from expertd.packing.checkpoint_files import find_tensors, read_config
from expertd.packing.side_files import COPIED_FILES, find_side_files
from expertd_testing.hub import Hub
from expertstore.errors import CheckpointError
from tests.expert_store.hub.conftest import NAME, NUM_SHARDS

INDEX = "model.safetensors.index.json"


def folder_of(place: Path, *, keep: bool = False) -> HubFolder:
    return HubFolder(HuggingFaceRepository(HubReference("hf", NAME)), place, keep=keep)


def shards_of(folder: HubFolder) -> list[Path]:
    return [folder.path / name for name in folder.shards]


def disk_bytes(place: Path) -> int:
    return sum(512 * file.lstat().st_blocks for file in place.rglob("*"))


def test_it_looks_like_the_checkpoint(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES, lambda *count: counts.append(count))
        assert counts == [(1 + index, NUM_SHARDS) for index in range(NUM_SHARDS)]
        config = read_config(folder.path)
        assert config == read_config(sharded)
        tensors = {
            tensor.name: tensor.entry for tensor in find_tensors(folder.path, config).tensors
        }
        there = find_tensors(sharded, config).tensors
        assert tensors == {tensor.name: tensor.entry for tensor in there}
        names = [file.name for file in find_side_files(folder.path)]
        assert names == [file.name for file in find_side_files(sharded)]
        assert disk_bytes(folder.path) < 100_000, "shards are holes"
        shard = shards_of(folder)[0]
        assert not folder.is_here(shard)
        data = (sharded / shard.name).read_bytes()
        assert folder.read(shard, 5000, 10) == data[5000:5010]


def test_shards_come_as_they_are_waited_for(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES)
        shards = shards_of(folder)
        hub.asked.clear()
        folder.fetch(shards)
        assert folder.wanted_bytes == sum(file.stat().st_size for file in shards)
        folder.wait(shards[0])
        folder.wait(shards[NUM_AHEAD])
        for shard in shards[: 1 + NUM_AHEAD]:
            assert shard.read_bytes() == (sharded / shard.name).read_bytes()
        folder.wait(shards[-1])
        assert hub.asked == [shard.name for shard in shards]
        before = disk_bytes(tmp_path)
        folder.drop(shards[0])
        assert not folder.is_here(shards[0])
        assert before - disk_bytes(tmp_path) > 0.9 * (sharded / shards[0].name).stat().st_size
        assert shards[0].stat().st_size == (sharded / shards[0].name).stat().st_size
        folder.drop(shards[0])  # is harmless
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES)
        assert [folder.is_here(shard) for shard in shards] == [False, True, True, True, True]
        folder.fetch(shards)
        folder.wait(shards[0])
        assert hub.asked[NUM_SHARDS:].count(shards[0].name) == 1
        assert shards[1].name not in hub.asked[NUM_SHARDS:]


def test_no_more_than_some_ahead(hub: Hub, tmp_path: Path) -> None:
    came: list[str] = []
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES)
        bring = folder._bring_shard

        def note(shard: object) -> None:
            bring(shard)  # type: ignore[arg-type]
            came.append(shard.name)  # type: ignore[attr-defined]

        folder._bring_shard = note  # type: ignore[method-assign,assignment]
        shards = shards_of(folder)
        folder.fetch(shards)
        folder.wait(shards[0])
        folder.wait(shards[1])
        folder.close()
        # The thread has ended: what it did not bring by now, it was not asked for.
        assert len(came) <= 2 + NUM_AHEAD


def test_a_shard_that_cannot_be_fetched(hub: Hub, tmp_path: Path) -> None:
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES)
        shards = shards_of(folder)
        hub.replaced[shards[1].name] = b"!" * shards[1].stat().st_size
        folder.fetch(shards)
        folder.wait(shards[0])
        with pytest.raises(CheckpointError, match="came 2 times with other bytes"):
            folder.wait(shards[1])
        with pytest.raises(CheckpointError, match="came 2 times with other bytes"):
            folder.wait(shards[2])


def test_closing_ends_a_wait(hub: Hub, tmp_path: Path) -> None:
    errors: list[BaseException] = []
    folder = folder_of(tmp_path / "hub")
    folder.prepare(COPIED_FILES)
    shards = shards_of(folder)
    folder._order = shards

    def wait() -> None:
        try:
            folder.wait(shards[0])
        except RuntimeError as error:
            errors.append(error)

    thread = Thread(target=wait)
    thread.start()
    folder.close()
    thread.join()
    assert len(errors) == 1


def test_kept_in_the_cache(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    with folder_of(tmp_path / "hub", keep=True) as folder:
        folder.prepare(COPIED_FILES)
        assert folder.most_bytes == 0
        shard = shards_of(folder)[0]
        folder.fetch([shard])
        folder.wait(shard)
        folder.drop(shard)
        assert folder.is_here(shard), "it is not ours"
    hub.asked.clear()
    with folder_of(tmp_path / "other") as folder:
        folder.prepare(COPIED_FILES)
        shard = shards_of(folder)[0]
        folder.fetch([shard])
        assert folder.wanted_bytes == 0
        folder.wait(shard)
        assert shard.read_bytes() == (sharded / shard.name).read_bytes()
        assert shard.name not in hub.asked


def test_a_cache_that_was_cleaned(hub: Hub, tmp_path: Path) -> None:
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES)
        shard = shards_of(folder)[0]
        shard.unlink()
        shard.symlink_to(tmp_path / "gone")
        (folder.path / "config.json").unlink()
        (folder.path / "config.json").symlink_to(tmp_path / "gone")
        folder.prepare(COPIED_FILES)
        assert not folder.is_here(shard)
        assert read_config(folder.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / INDEX).unlink(), "has no weights in safetensors"),
        (
            lambda path: (path / INDEX).rename(path / "pytorch_model.bin"),
            "has no weights in safetensors, but PyTorch's own files",
        ),
        (lambda path: (path / INDEX).write_text("{}"), "names no shards"),
        (
            lambda path: (path / INDEX).write_text('{"weight_map": {"w": "../out.safetensors"}}'),
            r"names \.\./out\.safetensors, which lies outside of the repository",
        ),
        (
            lambda path: (path / INDEX).write_text('{"weight_map": {"w": "/out.safetensors"}}'),
            "which lies outside of the repository",
        ),
        (
            lambda path: (path / "model-00003-of-00005.safetensors").unlink(),
            "lacks model-00003-of-00005.safetensors, which its model.safetensors.index.json names",
        ),
        (
            lambda path: (path / "model-00003-of-00005.safetensors").write_bytes(b"\xff" * 9999),
            "is no safetensors file",
        ),
        (
            lambda path: os.truncate(path / "tokenizer.json", 300 << 20),
            "more than any configuration",
        ),
    ],
)
def test_what_is_no_model(
    hub: Hub, sharded: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    import shutil

    changed = tmp_path / "changed"
    shutil.copytree(sharded, changed)
    change(changed)
    hub.repositories[NAME] = changed
    with folder_of(tmp_path / "hub") as folder, pytest.raises(CheckpointError, match=message):
        folder.prepare(COPIED_FILES)


def test_one_file_without_an_index(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    import shutil

    single = tmp_path / "single"
    single.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(sharded / name, single)
    shutil.copy(sharded / "model-00001-of-00005.safetensors", single / "model.safetensors")
    hub.repositories[NAME] = single
    with folder_of(tmp_path / "hub") as folder:
        folder.prepare(COPIED_FILES)
        assert list(folder.shards) == ["model.safetensors"]
    (single / "config.json").write_text(
        json.dumps(read_config(sharded) | {"transformers_weights": "named.safetensors"})
    )
    (single / "model.safetensors").rename(single / "named.safetensors")
    with folder_of(tmp_path / "other") as folder:
        folder.prepare(COPIED_FILES)
        assert list(folder.shards) == ["named.safetensors"]

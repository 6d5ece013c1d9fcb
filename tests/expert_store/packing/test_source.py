"""The files that transformers would load are the files that are packed, or a sentence says why."""

import json
import os
from pathlib import Path

import pytest
import torch

from expertd.packing.checkpoint_files import find_tensors, fingerprint, read_config
from expertstore.errors import CheckpointError
from tests.expert_store.packing.editing import INDEX, WEIGHTS, save_file, write_shards

ONE, TWO = (torch.full((2,), value) for value in (1.0, 2.0))


def places(path: Path, config: dict[str, object] | None = None) -> dict[str, str]:
    """The file of each tensor that is found."""
    listing = find_tensors(path, config or {})
    return {each.name: str(each.file.relative_to(path)) for each in listing.tensors}


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """As where a merge was saved over shards, whose index is left."""
    write_shards(tmp_path, {"model-00001-of-00001.safetensors": {"old": ONE}})
    save_file({"new": TWO}, tmp_path / WEIGHTS)
    assert places(tmp_path) == {"new": WEIGHTS}


def test_the_index_only_names_files(tmp_path: Path) -> None:
    """In subdirectories, with a tensor in another shard, or in two, of which the later counts."""
    one, two = "layers/1.safetensors", "layers/2.safetensors"
    shards = {one: {"a": ONE, "both": TWO}, two: {"b": TWO, "more": ONE}}
    write_shards(tmp_path, shards, b=one)
    assert places(tmp_path) == {"a": one, "both": one, "b": two, "more": two}
    save_file({"both": TWO}, tmp_path / two)
    assert places(tmp_path) == {"a": one, "both": two}


@pytest.mark.parametrize("name", ["gone.safetensors", "../gone", "/gone/gone", "gone/"])
def test_a_shard_that_is_not_there(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"lacks .*gone[^ ]*, which its index names"):
        find_tensors(tmp_path, {})


def test_what_the_index_names_and_no_file_holds(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"a": ONE}}, gone="a.safetensors")
    assert find_tensors(tmp_path, {}).absent == {"gone"}


def test_a_file_that_the_configuration_names(tmp_path: Path) -> None:
    save_file({"usual": ONE}, tmp_path / WEIGHTS)
    save_file({"own": ONE}, tmp_path / "own.safetensors")
    assert places(tmp_path, {"transformers_weights": "own.safetensors"}) == {
        "own": "own.safetensors"
    }
    for name, message in (
        ("gone.safetensors", "lacks gone.safetensors, which its config.json names"),
        ("own.bin", "neither a safetensors file nor an index"),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_tensors(tmp_path, {"transformers_weights": name})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "has 2 shards such as model-00001-of-00002.* lacks model.safetensors.index.json, .*"
            "or write it: {.*}",
        ),
        (["model.fp16.safetensors"], "the variant model.fp16.safetensors; .* link it as model.saf"),
        (["adapter_config.json", "adapter_model.safetensors"], r"an adapter \(LoRA\) .* merge it"),
        (["consolidated.safetensors"], "maker's own format .* in the form of Hugging Face"),
        (["pytorch_model.bin"], "PyTorch's own files .* save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "PyTorch's own"),
        (["weights.safetensors"], "no other, such as weights.safetensors, unless config.json"),
        ([], "download the whole model again"),
    ],
)
def test_why_there_are_no_weights(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        find_tensors(tmp_path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, "shard"])
def test_links_of_a_cache_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "models--me--my-model/snapshots/0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if name == "shard":
        write_shards(folder, {name: {"a": ONE}})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/abc")
    with pytest.raises(
        CheckpointError,
        match=rf"{name} is a link to ../../blobs/abc, .* `hf download me/my-model {name}`",
    ):
        find_tensors(folder, read_config(folder))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "\ufeff{}"]
)
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json (is damaged|names no tensors)"):
        find_tensors(tmp_path, {})


def test_an_index_without_metadata_is_enough(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"a": ONE}})
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert places(tmp_path) == {"a": "a.safetensors"}


def test_configurations_as_python_writes_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": Infinity, "b": [NaN, -Infinity], "a": 1e999}')
    assert read_config(tmp_path)["a"] == float("inf")
    for text in (b"[]", b"{", b"\xff", b"[" * 100_000, b"null"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config.json is damaged"):
            read_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "shard", "index"])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shards(tmp_path, {"shard": {"a": ONE}})
    file = tmp_path / {"index": INDEX}.get(name, name)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=r"not a regular file|has no model\.safetensors"):
        find_tensors(tmp_path, read_config(tmp_path))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": ONE}, path / "a.safetensors")
    (path / WEIGHTS).symlink_to(os.fsdecode(b"\xe9"))
    with pytest.raises(CheckpointError, match="is a link to"):
        find_tensors(path, read_config(path))
    (path / WEIGHTS).unlink()
    (path / "a.safetensors").rename(path / WEIGHTS)
    assert fingerprint(path, find_tensors(path, read_config(path)).tensors)

"""The directory of packs."""

from pathlib import Path

import pytest

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd.packing.shelf import find_pack, list_packs, remove_pack
from expertstore.errors import ConfigError
from tests.expert_store.packing.conftest import MakeCheckpoint


def test_what_is_there(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    assert list_packs(tmp_path / "absent") == []
    pack(Request(checkpoint_of("mixtral"), tmp_path / "whole", choose_scheme("4bit")))
    (tmp_path / "begun.partial/hub").mkdir(parents=True)
    (tmp_path / "begun.partial/hub/shard").write_bytes(b"x" * 8192)
    (tmp_path / "interrupted.partial").mkdir()
    (tmp_path / "interrupted.partial/journal").touch()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/pack.json").write_text("{")
    (tmp_path / "file").touch()
    (tmp_path / "whole.partial").mkdir()
    (tmp_path / "whole.partial/journal").touch()
    found = {each.name: each for each in list_packs(tmp_path)}
    assert list(found) == ["begun", "broken", "interrupted", "whole"]
    assert found["begun"].state == "begun"
    assert found["begun"].num_bytes >= 8192
    assert "pack.json" in found["broken"].state
    whole = found["whole"]
    assert (whole.state, whole.scheme) == ("whole; another is begun", "4bit")
    assert whole.architecture == "MixtralForCausalLM"
    sizes = [file.stat().st_size for file in whole.path.glob("*.safetensors")]
    assert sum(sizes) <= whole.num_bytes < sum(sizes) + 100_000
    assert 0 < whole.expert_bytes < sum(sizes)


def test_removing(tmp_path: Path) -> None:
    for name in ("a", "b", "b.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/pack.json").touch()
    (tmp_path / "b/notes").touch()
    (tmp_path / "b.partial/journal").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("absent", "link", "..", ".", ""):
        with pytest.raises(ConfigError, match="is no pack; `expertd packs` lists"):
            find_pack(tmp_path, name)
    remove_pack(find_pack(tmp_path, str(tmp_path / "a")))
    assert not (tmp_path / "a").exists()
    remove_pack(find_pack(tmp_path, "b"))
    assert not (tmp_path / "b.partial").exists()
    assert (tmp_path / "b/notes").exists(), "it is no pack"

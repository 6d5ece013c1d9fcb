"""What is refused before torch is imported, and that it is no more than what has to be."""

import shutil
from pathlib import Path

import pytest

from expertd.packing import early
from expertd.packing.early import (
    check_checkpoint,
    check_destination,
    check_early,
    check_room,
    least_bytes,
)
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES, choose_scheme
from expertstore.errors import CheckpointError, ConfigError, PackError
from expertstore.pack.manifest import read_manifest
from tests.expert_store.packing.conftest import MakeCheckpoint


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/pack.json").touch()
    for source, message in (
        (tmp_path / "pack", "is a pack already; serve it"),
        (tmp_path / "absent", "is not a directory; give the checkpoint's"),
        (Path("../a-model"), "is not a directory; give the checkpoint's"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_checkpoint(source)


def test_a_pack_that_is_there(tmp_path: Path) -> None:
    destination = tmp_path / "p"
    check_destination(destination, force=False)
    destination.symlink_to(tmp_path / "absent")
    with pytest.raises(PackError, match="exists already"):
        check_destination(destination, force=False)
    with pytest.raises(PackError, match="replaces only packs"):
        check_destination(destination, force=True)
    destination.unlink()
    destination.mkdir()
    (destination / "pack.json").touch()
    check_destination(destination, force=True)
    with pytest.raises(PackError, match="give --force"):
        check_destination(destination, force=False)
    # Its own packing may have been interrupted after the last step, which the packer can tell.
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial/journal").touch()
    check_destination(destination, force=False)


@pytest.mark.parametrize("scheme", ["bf16", "4bit", "paper-2bit"])
def test_a_pack_takes_no_less_and_little_more(
    scheme: str, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    source = checkpoint_of("mixtral")
    pack(Request(source, tmp_path / "p", choose_scheme(scheme), optimize=False))
    manifest = read_manifest(tmp_path / "p").manifest
    takes = manifest.expert_bytes + manifest.trunk.num_bytes
    assert 0.5 * takes < least_bytes(source, SCHEMES[scheme]) < takes


def test_a_disk_that_is_too_small(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scheme = checkpoint_of("mixtral"), choose_scheme("4bit")
    usage = shutil.disk_usage(tmp_path)
    least = least_bytes(source, scheme)
    monkeypatch.setattr(early.shutil, "disk_usage", lambda _: usage._replace(free=least - 8192))
    with pytest.raises(PackError, match=r"free, and making the pack takes .* or more; free some"):
        check_room(source, tmp_path / "p", scheme)
    # What an interrupted packing has reserved is counted.
    (tmp_path / "p.partial/pack").mkdir(parents=True)
    (tmp_path / "p.partial/pack/experts").write_bytes(bytes(16384))
    check_room(source, tmp_path / "p", scheme)
    shutil.rmtree(tmp_path / "p.partial")
    # A checkpoint whose files cannot be read is the packer's to refuse.
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    check_room(tmp_path, tmp_path / "p", scheme)


def test_a_directory_that_may_not_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read: Permission denied\.$"):
        check_early(tmp_path / "m", tmp_path / "p", choose_scheme("4bit"), force=False)

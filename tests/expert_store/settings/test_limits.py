"""Minima, maxima and pins as they are written, and what is refused in one sentence."""

from pathlib import Path

import pytest

from expertd.settings.config import ServeConfig, load_config
from expertd.settings.disk_io import DiskIo
from expertd.settings.limits import ModelConfig, ModelLimits, pinned_entries
from expertd_testing.handmade import PAGE, make_pack
from expertstore.errors import ConfigError
from expertstore.pack.manifest import read_manifest


def _load(tmp_path: Path, models: str) -> ServeConfig:
    path = tmp_path / "expertd.toml"
    path.write_text(models)
    return load_config(path, socket=Path("s"), ram_bytes=4096)


def test_a_model_is_a_path_or_a_table(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        """
        [models]
        plain = "/packs/plain"
        [models.mixtral]
        path = "/packs/mixtral"
        min = "2GiB"
        max = 8589934592
        pin = ["0:3", "5:*"]
        [models."gpt oss"]
        path = "/packs/gpt-oss"
        disk_io = "direct"
        """,
    )
    assert config.models == {
        "plain": ModelConfig(Path("/packs/plain")),
        "mixtral": ModelConfig(
            Path("/packs/mixtral"), ModelLimits(2 << 30, 8 << 30, ("0:3", "5:*"))
        ),
        "gpt oss": ModelConfig(Path("/packs/gpt-oss"), disk_io=DiskIo.DIRECT),
    }


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("models.m = 3", ["models.m is a int", "table"]),
        ('models.m = {min = "1GiB"}', ["models.m has no path"]),
        ('models.m = {path = "/p", mim = 1}', ["models.m.mim", "path, min, max, pin and disk_io"]),
        ('models.m = {path = "/p", min = "much"}', ["models.m", "'much' is not a size"]),
        ('models.m = {path = "/p", max = true}', ["models.m", "True is not a size"]),
        ('models.m = {path = "/p", max = 0}', ["models.m", "positive"]),
        ('models.m = {path = "/p", min = -1}', ["models.m", "0 or more"]),
        ('models.m = {path = "/p", min = 8192, max = 4096}', ["models.m", "8.0 KiB", "exceed"]),
        ('models.m = {path = "/p", pin = "0:1"}', ["models.m.pin", "list"]),
        ('models.m = {path = "/p", disk_io = "fast"}', ["models.m", "'fast'", "direct"]),
        ('models.m = {path = "/p", disk_io = []}', ["models.m", "[]", "direct"]),
        ('models.m = {path = "/p", pin = ["0"]}', ["models.m", "'0' is no pin", "LAYER:EXPERT"]),
        ('models.m = {path = "/p", pin = ["0:3-1"]}', ["'0:3-1' is no pin"]),
        ('models.m = {path = "/p", pin = ["0:-1"]}', ["is no pin"]),
        ('models.m = {path = "/p", pin = ["99999999:0"]}', ["is no pin"]),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, line: str, names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, line)
    message = str(caught.value)
    assert all(name in message for name in [str(tmp_path), *names]), message
    assert message.endswith(".")
    assert message.count(".\n") == 0
    assert ".." not in message


def test_pins_name_entries(tmp_path: Path) -> None:
    manifest = read_manifest(make_pack(tmp_path / "pack")).manifest  # 3 layers of 8
    assert pinned_entries(["0:3", " 2 : 1-2 ", "0:3"], manifest, "m") == [3, 17, 18]
    assert pinned_entries(["1:*"], manifest, "m") == list(range(8, 16))
    assert pinned_entries(["*:0"], manifest, "m") == [0, 8, 16]
    assert pinned_entries(["0-1:7"], manifest, "m") == [7, 15]
    assert pinned_entries([], manifest, "m") == []
    with pytest.raises(ConfigError, match="'m' has no layer 3 with experts, which '1-3:0' pins"):
        pinned_entries(["1-3:0"], manifest, "m")
    with pytest.raises(ConfigError, match=r"no expert 8 in layer 0, which '\*:8' pins; it has 8"):
        pinned_entries(["*:8"], manifest, "m")


def test_minima_are_kept_in_whole_records(tmp_path: Path) -> None:
    manifest = read_manifest(make_pack(tmp_path / "pack", record_bytes=3 * PAGE)).manifest
    assert ModelLimits().guarded_bytes(manifest) == 0
    assert ModelLimits(1).guarded_bytes(manifest) == 3 * PAGE
    assert ModelLimits(6 * PAGE).guarded_bytes(manifest) == 6 * PAGE
    assert ModelLimits(1 << 40).guarded_bytes(manifest) == 24 * 3 * PAGE

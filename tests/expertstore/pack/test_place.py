"""Where packs lie that are named without a path."""

from pathlib import Path

import pytest

from expertstore.pack.place import named_pack, packs_directory


def test_where_packs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTD_PACKS", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packs_directory() == tmp_path / ".local/share/expertd/packs"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert packs_directory() == Path("/data/expertd/packs")
    monkeypatch.setenv("EXPERTD_PACKS", "packs")
    assert packs_directory() == Path.cwd() / "packs"


def test_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_PACKS", str(tmp_path / "packs"))
    monkeypatch.chdir(tmp_path)
    for name in ("there", "both", "no-pack"):
        (tmp_path / "packs" / name).mkdir(parents=True)
    (tmp_path / "packs/there/pack.json").touch()
    (tmp_path / "packs/both/pack.json").touch()
    (tmp_path / "both").mkdir()
    assert named_pack(Path("there")) == tmp_path / "packs/there"
    for path in ("both", "no-pack", "absent", "./x/there", "/there"):
        assert named_pack(Path(path)) == Path(path)

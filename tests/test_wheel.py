"""What the wheel holds, looked into as it is built."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertd.cli import deploy_files
from expertd.cli.commands import app
from expertstore.errors import InvalidInputError
from hatch_build import readme_of_the_package

ROOT = Path(__file__).parent.parent
SHIPPED = {
    str(file.relative_to(ROOT))
    for file in (ROOT / "deploy").rglob("*")
    if file.is_file() and file.name != "check"
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_every_package_is_typed(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    packages = {name.split("/")[0] for name in names if name.endswith("__init__.py")}
    assert packages == {"expertstore", "expertd", "expertd_client", "expertd_inference"}
    assert {name for name in names if name.endswith("py.typed")} == {
        f"{package}/py.typed" for package in packages
    }


def test_no_double_is_in_it(wheel: zipfile.ZipFile) -> None:
    doubles = {file.name for file in (ROOT / "tests/doubles/expertd_testing").glob("*_*.py")}
    assert doubles
    files = {Path(name).name for name in wheel.namelist() if not name.endswith("__init__.py")}
    assert not files & doubles
    assert not any("fake" in name or "standin" in name for name in files)


def test_the_files_of_deploy_are_in_it(wheel: zipfile.ZipFile) -> None:
    inside = {name.removeprefix("expertd/") for name in wheel.namelist()}
    assert {name for name in inside if name.startswith("deploy/")} == SHIPPED


def test_the_server_s_pages_are_in_it(wheel: zipfile.ZipFile) -> None:
    place = "expertd_inference/server/pages/"
    inside = {name.removeprefix(place) for name in wheel.namelist() if name.startswith(place)}
    pages = ROOT / "inference" / place
    assert {file.name for file in pages.iterdir() if file.is_file()} == inside
    assert {"chat.html", "host.html", "chat.js", "style.css", "icon.svg"} <= inside


def test_its_readme_has_no_link_that_leads_nowhere(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "](https://arxiv.org/abs/2312.17238)" in text
    assert "](docs/" not in text
    assert "docs/install.md" in text, "a link's words stay"


def test_links_lead_into_a_repository_that_is_known() -> None:
    text = "![a](docs/a.svg) [b](docs/b.md#c) [d](https://e.f) [g](#h)"
    assert readme_of_the_package(text, "https://x.y/z") == (
        "![a](https://x.y/z/raw/main/docs/a.svg) [b](https://x.y/z/blob/main/docs/b.md#c) "
        "[d](https://e.f) [g](#h)"
    )
    assert readme_of_the_package(text, None) == " b [d](https://e.f) [g](#h)"


def test_deploy_files_writes_them(tmp_path: Path) -> None:
    written = CliRunner().invoke(app, ["deploy-files", str(tmp_path / "a b")])
    assert written.exit_code == 0
    files = {str(file.relative_to(tmp_path / "a b")) for file in (tmp_path / "a b").rglob("*.*")}
    assert {name.removeprefix("deploy/") for name in SHIPPED} - {"container/Containerfile"} <= files
    unit = tmp_path / "a b/systemd/expertd.service"
    assert unit.read_text() == (ROOT / "deploy/systemd/expertd.service").read_text()
    assert str(unit) in written.stdout


def test_deploy_files_replaces_nothing_unasked(tmp_path: Path) -> None:
    kept = tmp_path / "systemd/expertd.service"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(InvalidInputError, match=r"expertd.service is there already.*--force"):
        deploy_files.deploy_files(tmp_path)
    assert kept.read_text() == "mine"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [kept], "none of them"
    deploy_files.deploy_files(tmp_path, force=True)
    assert kept.read_text() != "mine"


def test_deploy_files_of_an_installation_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy_files, "PACKAGE", tmp_path / "lib/python/expertd")
    with pytest.raises(InvalidInputError, match=r"without the files of deploy"):
        deploy_files.files_of_deploy()
    (tmp_path / "file").touch()
    monkeypatch.undo()
    with pytest.raises(InvalidInputError, match=r"cannot be written: File name too long"):
        deploy_files.deploy_files(tmp_path / ("a" * 300))
    with pytest.raises(InvalidInputError, match=r"cannot be written: Not a directory"):
        deploy_files.deploy_files(tmp_path / "file")

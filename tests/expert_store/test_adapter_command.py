"""``expertd adapter``: adapters are kept by name, and those of another base are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from expertd.cli import adapter
from expertd_testing.adapters import make_adapter
from expertd_testing.handmade import make_pack
from expertstore.errors import AdapterError, ExpertdError, NotFoundError, UnavailableError
from expertstore.pack.tensor_file import build_header

Q = "model.layers.0.self_attn.q_proj"
Run = Callable[..., Result]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """One whose trunk has a matrix of 4 by 6."""
    made = make_pack(tmp_path / "packs/base", layers=1)
    header = build_header([(f"{Q}.weight", "BF16", (4, 6))])
    (made / "trunk.safetensors").write_bytes(header + bytes(48))
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("EXPERTD_PACKS", str(tmp_path / "packs"))
    monkeypatch.delenv("EXPERTD_ADAPTERS", raising=False)
    app = typer.Typer()
    adapter.register(app)
    app.callback()(lambda: None)

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(app, ["adapter", *map(str, words)])

    return invoke


def refused(result: Result, kind: type[ExpertdError]) -> str:
    assert isinstance(result.exception, kind), result.output
    message = str(result.exception)
    assert "\n" not in message
    return message


def test_load_list_unload(run: Run, pack: Path, tmp_path: Path) -> None:
    assert "has no adapters" in run("list").output
    source = make_adapter(tmp_path / "lora", {Q: (4, 6)})
    for base in ("base", pack):
        done = run("load", "sql", source, "--base", base)
        assert done.exit_code == 0, done.output
        assert f" over base, in {tmp_path}/adapters/sql\n" in done.output
    assert '"model": "base"' in run("list", "--json").output
    assert run("list").output.startswith("sql: ")
    kept = tmp_path / "adapters/sql/adapter_model.safetensors"
    assert kept.read_bytes() == (source / kept.name).read_bytes()
    assert [each.name for each in (tmp_path / "adapters").iterdir()] == ["sql"], "nothing beside"
    assert run("unload", "sql").exit_code == 0
    assert "no adapter 'sql'; name one of: none" in refused(run("unload", "sql"), NotFoundError)


def test_what_is_refused(run: Run, pack: Path, tmp_path: Path) -> None:
    wide = make_adapter(tmp_path / "wide", {Q: (4, 8)})
    said = refused(run("load", "x", wide, "--base", pack), AdapterError)
    assert f"is of another base than base: {Q} is 4 x 8 there, and 4 x 6 in the pack" in said
    good = make_adapter(tmp_path / "good", {Q: (4, 6)})
    for name, why in (("../x", "cannot be an adapter's name"), ("base", "is the name of a model")):
        assert why in refused(run("load", name, good, "--base", pack), AdapterError)
    weights = good / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    assert "cannot be used: " in refused(run("load", "x", good, "--base", pack), AdapterError)
    nowhere = ("--base", "gone", "--socket", tmp_path / "s")
    refused(run("load", "x", wide, *nowhere), UnavailableError)
    assert not (tmp_path / "adapters").exists()

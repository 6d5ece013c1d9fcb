"""``expertd pack ORG/NAME`` as a user sees it."""

import filecmp
import json
import re
import sys
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from expertd.cli import pack, packs
from expertd.packing import packer
from expertd_testing.hub import Hub
from expertstore.errors import CheckpointError, PackError, PreconditionError
from tests.expert_store.hub.conftest import NAME, NUM_SHARDS
from tests.expert_store.packing.editing import write_shards
from tests.stored_weights import KINDS, make_stored


def run(*arguments: object, given: str = "") -> Result:
    app = typer.Typer()
    pack.register(app)
    packs.register(app)
    words = [str(word) for word in arguments]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, words, input=given)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packs lie."""
    monkeypatch.setenv("EXPERTD_PACKS", str(tmp_path / "packs"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    return tmp_path / "packs"


@pytest.fixture
def local(sharded: Path, tmp_path: Path) -> Path:
    """The pack of the checkpoint on the disk."""
    result = run("pack", sharded, tmp_path / "local", "--scheme", "4bit", "--no-optimize")
    assert result.exit_code == 0, result.output
    return tmp_path / "local"


def same(left: Path, right: Path) -> bool:
    names = sorted(file.name for file in left.iterdir())
    assert names == sorted(file.name for file in right.iterdir())
    return filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


def test_from_a_name_to_a_pack(hub: Hub, local: Path, place: Path) -> None:
    result = run("pack", NAME, "--scheme", "4bit", "--no-optimize")
    assert result.exit_code == 0, result.output
    assert same(local, place / "tiny-4bit")
    assert list(place.iterdir()) == [place / "tiny-4bit"], "nothing is left of the fetching"
    lines = result.stderr.splitlines()
    assert re.fullmatch(
        r"hf://org/tiny at 0123456789ab: 4\.\d MiB to fetch in 5 files, of which at most \d\.\d "
        r"MiB are here at a time\. The pack takes about 1\.\d MiB on the disk; in RAM all its "
        r"experts take 1\.\d MiB, and each worker \d+\.\d KiB and its context\.",
        lines[0],
    )
    assert lines[1] == "packing hf://org/tiny as 4bit"
    assert f"--model tiny-4bit={place}/tiny-4bit" in result.stdout
    again = run("pack", NAME, "--scheme", "4bit")
    assert isinstance(again.exception, PackError)
    assert "exists already; give --force" in str(again.exception)


def test_weights_whose_pieces_lie_in_several_shards(hub: Hub, place: Path, tmp_path: Path) -> None:
    """Integers, zeros and scales of one matrix, for example; kept without a word."""
    stored, _ = make_stored(tmp_path, KINDS["gptq"])
    local = run("pack", stored, tmp_path / "local")
    assert local.exit_code == 0, local.output
    tensors = load_file(stored / "model.safetensors")
    (stored / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {f"{end}.safetensors": {} for end in range(4)}
    for index, name in enumerate(sorted(tensors)):
        shards[f"{index % 4}.safetensors"][name] = tensors[name]
    write_shards(stored, shards)
    hub.repositories[NAME] = stored
    result = run("pack", NAME)
    assert result.exit_code == 0, result.output
    assert "Its weights come quantized, and stay as they are." in result.stderr
    assert same(tmp_path / "local", place / "tiny")


def test_few_shards_are_here_at_a_time(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "COMMIT_SECONDS", 0.0)
    largest = 0
    commit = packer._commit

    def look(*arguments: object) -> list[int]:
        nonlocal largest
        here = list((place / "tiny.partial/hub").glob("*/fetched/*.safetensors"))
        largest = max(largest, len(here))
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(packer, "_commit", look)
    result = run("pack", NAME, place / "tiny", "--scheme", "bf16")
    assert result.exit_code != 0, "its parent is not there"
    place.mkdir()
    result = run("pack", NAME, place / "tiny", "--scheme", "bf16")
    assert result.exit_code == 0, result.output
    # One that is packed, up to two ahead, one that experts at its end share with the next.
    assert 1 <= largest <= 4
    assert NUM_SHARDS > 4


def test_an_interrupted_one_goes_on(
    hub: Hub, local: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "COMMIT_SECONDS", 0.0)
    broken = "model-00004-of-00005.safetensors"
    data = (hub.repositories[NAME] / broken).read_bytes()
    hub.replaced[broken] = data[:-1] + bytes([data[-1] ^ 1])
    result = run("pack", NAME, "--scheme", "4bit", "--no-optimize")
    assert isinstance(result.exception, CheckpointError)
    message = str(result.exception)
    assert re.search(
        rf"{broken} .* with other bytes .* \d+ of \d+ steps are done and kept", message
    )
    assert "tiny-4bit" in run("packs").stdout
    assert "begun" in run("packs").stdout
    del hub.replaced[broken]
    hub.asked.clear()
    hub.downloads.clear()
    result = run("pack", NAME, "--scheme", "4bit", "--no-optimize")
    assert result.exit_code == 0, result.output
    assert re.search(r"Going on after [1-9]\d* of", result.stderr)
    assert same(local, place / "tiny-4bit")
    first = "model-00001-of-00005.safetensors"
    assert first not in hub.downloads, "what it held is packed"
    assert broken in hub.downloads
    assert "config.json" not in hub.asked


def test_another_commit_begins_anew(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "COMMIT_SECONDS", 0.0)
    broken = "model-00005-of-00005.safetensors"
    data = (hub.repositories[NAME] / broken).read_bytes()
    hub.replaced[broken] = data[:-1] + bytes([data[-1] ^ 1])
    assert run("pack", NAME, "--scheme", "4bit").exit_code != 0
    hub.replaced.clear()
    hub.commit = "f" * 40
    result = run("pack", NAME, "--scheme", "4bit")
    assert result.exit_code == 0, result.output
    assert "is of another packing; beginning anew" in result.stderr


def test_kept(hub: Hub, place: Path, tmp_path: Path) -> None:
    result = run("pack", NAME, "--scheme", "4bit", "--keep")
    assert result.exit_code == 0, result.output
    assert "in 5 files, which stay in the hub's cache" in result.stderr
    cached = [file for file in (tmp_path / "cache").rglob("*.safetensors") if file.exists()]
    assert len(cached) == NUM_SHARDS
    hub.asked.clear()
    assert run("pack", NAME, "--scheme", "8bit").exit_code == 0
    assert not [name for name in hub.asked if name.endswith(".safetensors")]


def test_too_little_disk(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil._ntuple_diskusage(10**9, 10**9 - 2_600_000, 2_600_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    result = run("pack", NAME, "--scheme", "4bit")
    assert isinstance(result.exception, PackError), "1.3 MiB of pack, 2.5 of shards beside it"
    assert "making the pack takes" in str(result.exception)


def advising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, code: int = 0) -> None:
    """Has this text be what ``expert-run advise`` prints."""
    program = tmp_path / "bin/expert-run"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\ncat <<'END'\n{output}\nEND\n"
                       f"echo 'expert-run: why not' >&2\nexit {code}\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))


def test_the_scheme_is_advised(
    hub: Hub, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"choice": {"scheme": "8bit"}, "why": "Choose 8bit: it fits.", "next": []}
    advising(tmp_path, monkeypatch, json.dumps(answer))
    result = run("pack", NAME)
    assert result.exit_code == 0, result.output
    assert "Choose 8bit: it fits." in result.stderr
    assert json.loads((place / "tiny/pack.json").read_text())["scheme"] == "8bit"
    asked = (tmp_path / "asked").read_text()
    assert (
        asked
        == f"advise --json --model {place}/tiny.partial/hub/{hub.commit}/checkpoint --dir {place}\n"
    )


def test_no_scheme_fits(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"choice": None, "why": "This host cannot serve it.", "next": []}
    advising(tmp_path, monkeypatch, json.dumps(answer))
    result = run("pack", NAME)
    assert isinstance(result.exception, PreconditionError)
    assert str(result.exception).startswith("This host cannot serve it. To pack it for another")


def test_nobody_can_advise(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advising(tmp_path, monkeypatch, "", 2)
    result = run("pack", NAME)
    assert isinstance(result.exception, PreconditionError)
    assert "cannot choose a scheme (expert-run: why not); name one" in str(result.exception)


def test_packs_and_remove(local: Path, place: Path) -> None:
    assert "has no packs; `expertd pack ORG/NAME` makes one there" in run("packs").stdout
    place.mkdir()
    local.rename(place / "mine")
    shown = run("packs")
    assert re.search(r"mine +4bit +1\.\d MiB +1\.\d MiB +whole", shown.stdout)
    (found,) = json.loads(run("packs", "--json").stdout)["packs"]
    assert (found["name"], found["state"], found["scheme"]) == ("mine", "whole", "4bit")
    assert run("remove", "mine", given="n\n").exit_code == 1
    assert (place / "mine").exists()
    result = run("remove", "mine", given="y\n")
    assert "1.6 MiB are free again" in result.stdout, result.output
    assert not (place / "mine").exists()

"""``expert-run advise`` as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.packing.synthetic import make_pack
from expertd_inference.advice import probes
from expertd_inference.cli.commands import app
from expertstore.errors import ExpertdError
from tests.inference.advice.test_models import TINY
from tests.inference.cli.test_commands import AT_ONCE, assert_refused, run, run_forked


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return make_pack(tmp_path / "small-pack", "olmoe-1b-7b", "4bit", 2, overrides=TINY)


def refusal(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command would say in its one line."""
    # The environment it prepares is not the tests'.
    monkeypatch.setattr("expertd_inference.cli.advise.prepare_environment", lambda **_: None)
    with pytest.raises(ExpertdError) as caught:
        app(["advise", *map(str, arguments)], standalone_mode=False)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_pack_is_advised_on(pack: Path) -> None:
    done = run_forked("advise", "--model", pack, "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "small-pack"
    assert [row["share"] for row in found["predictions"]] == [1.0, 0.5, 0.25]
    assert all(row["tokens_per_second"] > 0 for row in found["predictions"])
    assert found["choice"]["fits"]
    assert found["next"][0].startswith("expertd serve")
    assert "memory: " in done.stderr, "it says what it measures meanwhile"
    assert "Traceback" not in done.stderr


def test_a_budget_below_a_token_s_experts(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal("--model", pack, "--ram", "8KiB", monkeypatch=monkeypatch)
    assert "--ram is 8.0 KiB, and one token of small-pack uses" in message


def test_sizes_that_are_none(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal("--model", pack, "--ram", "much", monkeypatch=monkeypatch)
    assert message.startswith("--ram: 'much' is not a size")


def test_a_gpu_that_is_not_here_needs_a_link(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "link_rate", lambda: None)
    message = refusal("--model", pack, "--gpu-memory", "12GiB", monkeypatch=monkeypatch)
    assert "give its rate by --link-rate" in message


def test_a_disk_that_cannot_be_written_to(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.open

    def refused(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "xb":
            raise PermissionError(13, "Permission denied")
        return plain(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refused)
    empty = tmp_path / "empty"
    empty.mkdir()
    threads = torch.get_num_threads()
    try:
        message = refusal("--model", pack, "--dir", empty, monkeypatch=monkeypatch)
    finally:
        torch.set_num_threads(threads)
    assert f"{empty} cannot be written to (Permission denied)" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(None, "neither a pack nor", id="no config"),
        pytest.param("{", "is damaged", id="damaged config"),
    ],
)
def test_a_directory_that_is_no_model(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert_refused(run("advise", "--model", tmp_path, command=AT_ONCE), message)


def test_a_shape_that_is_none() -> None:
    assert_refused(run("advise", "--model", "mixtral-7x8b", command=AT_ONCE), "nearest are")


def test_a_name_that_no_file_can_have() -> None:
    assert_refused(run("advise", "--model", "a" * 5000, command=AT_ONCE), "File name too long")

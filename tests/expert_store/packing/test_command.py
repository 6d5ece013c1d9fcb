"""The commands as a user sees them: what they print, and how they end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from expertd.cli import pack as pack_command
from expertd.cli import packs, progress
from expertstore.errors import CheckpointError, ConfigError, PackError
from tests.expert_store.packing.conftest import MakeCheckpoint


def run(*arguments: object, columns: int = 200) -> Result:
    app = typer.Typer()
    pack_command.register(app)
    packs.register(app)
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(word) for word in arguments])


@pytest.fixture
def pack(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> Path:
    result = run("pack", checkpoint_of("mixtral"), tmp_path / "pack", "--no-optimize")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{tmp_path}/pack: 24 experts, 1.3 MiB at 4.67 bits per weight, and 225.2 KiB of trunk. "
        "The least RAM to serve it (one token's experts) is 336KiB.\n"
        f"Next: expertd serve --ram 2MiB --model pack={tmp_path}/pack\n"
    )
    return tmp_path / "pack"


def test_progress_in_plain_lines(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    result = run("pack", checkpoint_of("mixtral"), tmp_path / "pack", "--scheme", "bf16")
    lines = result.stderr.splitlines()
    assert len(lines) == 50
    assert lines[0] == "packing mixtral as bf16", "before torch is imported"
    assert lines[1] == "packing mixtral as bf16: 0 %, 0 of 48 tensors and experts"
    assert lines[-1].startswith("packing mixtral as bf16: 100 %, 48 of 48 tensors and experts, ")
    assert lines[-1].endswith("/s, 0:00 left")


def test_verify(pack: Path) -> None:
    result = run("verify", pack)
    assert result.exit_code == 0
    assert result.stdout == (f"{pack}: all 24 records and the trunk are whole (1.5 MiB read).\n")
    file = pack / "experts-00000.safetensors"
    data = bytearray(file.read_bytes())
    size = (len(data) - 4096) // 24
    for record in (3, 20):
        data[4096 + record * size + 5] ^= 1
    file.write_bytes(data)
    (pack / "trunk.safetensors").unlink()
    result = run("verify", pack)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "damaged: experts-00000.safetensors, layer 0, expert 3: its checksum is wrong",
        "damaged: experts-00000.safetensors, layer 2, expert 4: its checksum is wrong",
        "damaged: trunk.safetensors: No such file or directory",
        f"{pack}: 3 damages found; copy or make the pack again. What is whole can still be served.",
    ]


def test_inspect(pack: Path) -> None:
    result = run("inspect", pack)
    assert result.exit_code == 0
    for words in ("MixtralForCausalLM", "4bit, 16-bit weights in BF16", "24 (8 per layer, 2 per "
                  "token)", "lm_head.weight (64.2 KiB)", "0-2", "gate_up.scale", "512 x 2",
                  "4.67 bits per weight", "12 matrices quantized"):  # fmt: skip
        assert words in result.stdout, words
    report = json.loads(run("inspect", pack, "--json").stdout)
    assert report["num_experts"] == 24
    assert report["expert_weights"] == 24 * 3 * 128 * 256
    assert report["layouts"][0]["parts"][0] == {
        "name": "gate_up.q", "offset": 0, "num_bytes": 32768, "shape": [256, 128], "dtype": "U8",
    }  # fmt: skip
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    assert report["trunk_bytes"] == (pack / "trunk.safetensors").stat().st_size


def test_precisions_of_parts(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    arguments = ("--experts", "3g32m", "--attention", "16", "--no-optimize")
    assert run("pack", checkpoint_of("mixtral"), tmp_path / "p", *arguments).exit_code == 0
    report = json.loads(run("inspect", tmp_path / "p", "--json").stdout)
    assert report["scheme"] == "4bit experts=3g32m attention=16"
    assert report["trunk_quantized_tensors"] == 0
    assert {matrix["bits"] for matrix in report["layouts"][0]["matrices"]} == {3}


def test_refusals_are_one_sentence(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint_of("mixtral")
    for arguments, kind in (
        (("pack", source, tmp_path / "p", "--scheme", "q4"), ConfigError),
        (("pack", source, tmp_path / "p", "--experts", "4"), ConfigError),
        (("pack", source, tmp_path / "absent/p"), ConfigError),
        (("pack", source, tmp_path / "p", "--device", "tpu"), ConfigError),
        (("pack", source, tmp_path), PackError),
        (("pack", source, tmp_path / "p\udcff"), PackError),  # which no worker could be told
        (("pack", tmp_path, tmp_path / "p"), CheckpointError),
        (("verify", tmp_path), PackError),
        (("inspect", tmp_path), PackError),
    ):
        result = run(*arguments)
        assert isinstance(result.exception, kind), arguments
        assert "\n" not in str(result.exception)
        assert not result.stdout
    assert not list(tmp_path.glob("p*"))


def test_an_output_that_is_full() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "expertd", "--version"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.stderr == "expertd: the output cannot be written: No space left on device.\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3600, "1:00:00"), (36061.6, "10:01:02")]
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert progress.format_seconds(seconds) == text


def test_help_teaches() -> None:
    text = run("pack", "--help").stdout
    for words in (
        "paper-2bit",
        "4bit-fast",
        "Example:",
        "--experts",
        "--device",
        "goes on where it was",
    ):
        assert words in text

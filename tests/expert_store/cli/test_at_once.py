"""``expertd`` answers at once what needs nothing that takes long to import."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_testing.daemon import Daemon, serving

EXAMPLE = Path(__file__).parents[3] / "examples/tiny-mixtral"
AT_ONCE = (
    "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'numpy']));"
    " from expertd.cli import main; main()"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AT_ONCE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with serving({}) as daemon:
        yield daemon


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), *((name, "--help") for name in ("serve", "pack", "top"))],
)
def test_help_and_version(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "expertd" in done.stdout


def test_stats_of_a_daemon(daemon: Daemon) -> None:
    done = run("stats", "--socket", daemon.socket)
    assert done.returncode == 0, done.stderr
    assert "arena" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stats", "--socket", "/nonexistent"), "No expertd answers"),
        (("inspect", "/nonexistent"), "is not a pack"),
        (("verify", "/nonexistent"), "is not a pack"),
        (("pack", "/nonexistent", "/tmp/pack"), "is not a directory; give the checkpoint's"),
        (("pack", "/", "/tmp/pack"), "is not a checkpoint: it has no config.json"),
        (("pack", EXAMPLE, "/tmp"), "/tmp exists already; give --force to replace it"),
        (("pack", EXAMPLE, "/tmp", "--force"), "is not a pack; --force replaces only packs"),
        (("pack", "s3://mistralai/Mixtral-8x7B-v0.1", "/tmp/pack"), "is on no hub that is known"),
        (("pack", "model.gguf", "/tmp/pack"), "model.gguf is not there; download it"),
        (("pack", "/", "/tmp/pack", "--scheme", "1bit"), "1bit"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("expertd: ")
    assert done.stderr.count("\n") == 1

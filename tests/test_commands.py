"""What all commands of both programs have in common, found by walking them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expertd.cli.commands import app as expertd
from expertd_inference.cli.commands import app as expert_run

ROOT = Path(__file__).parents[1]
APPS = {"expertd": expertd, "expert-run": expert_run}
NOBODY = 65534


def walk(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and those below it, each with the words that call it."""
    yield names, command
    for name, each in getattr(command, "commands", {}).items():
        yield from walk(each, *names, name)


COMMANDS = [
    found for name, app in APPS.items() for found in walk(typer.main.get_command(app), name)
]


@pytest.mark.parametrize("names", [" ".join(names) for names, _ in COMMANDS])
def test_help_by_either_name(names: str) -> None:
    program, *arguments = names.split()
    short, long = (
        CliRunner().invoke(APPS[program], [*arguments, option], env={"COLUMNS": "80"})
        for option in ("-h", "--help")
    )
    assert (short.exit_code, long.exit_code) == (0, 0), short.output
    assert short.output == long.output
    assert "Usage:" in short.output
    assert "--help" in short.output
    assert "-h" in short.output
    assert "…" not in short.output, "cut"


def test_a_walk_finds_them_all() -> None:
    found = {" ".join(names) for names, _ in COMMANDS}
    assert {"expertd serve", "expertd top", "expert-run generate", "expert-run advise"} <= found


@pytest.mark.parametrize(
    ("names", "command"),
    COMMANDS,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_paths_are_looked_at_by_the_commands_themselves(
    names: tuple[str, ...], command: Any
) -> None:
    """The parser would refuse one that may be entered but not listed as an invalid option."""
    for parameter in command.params:
        if parameter.type_descriptor.annotation is Path:
            assert not parameter.type_descriptor.parameter_info.readable, parameter.opts


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_socket_directory_that_may_not_be_listed(tmp_path: Path) -> None:
    """As a user meets it: the right sentence, also for one who may enter but not list it."""
    script = (
        "import os, expertd.cli.commands; from typer.testing import CliRunner; "
        # That user may be unable to read what is imported on the way.
        "CliRunner().invoke(expertd.cli.commands.app, ['stats', '--socket', '/none']); "
        "os.setgroups([]); "
        f"os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY}); "
        "expertd.cli.commands.run()"
    )
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    directory = tmp_path / "s"
    directory.mkdir()
    for mode, says in ((0o711, f"No expertd answers at {directory}"), (0o710, "may not enter")):
        directory.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", script, "stats", "--socket", str(directory)],
            capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert says in done.stderr

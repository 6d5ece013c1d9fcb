"""What is offered for copying arrives in a program as it was meant."""

import shlex
import subprocess
from pathlib import Path

import pytest

from expertstore.command_line import command, serve_command
from expertstore.socket_directory import how_to_start

ODD = ["my models", "it's", 'a "b"', "$HOME", "a;b", "-rf", "--force", "~x", "*", "a\nb", "é"]


@pytest.mark.parametrize("name", ODD)
def test_a_shell_takes_it_apart_again(name: str) -> None:
    line = command("printf", r"%s\0", Path(name), f"m={name}")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    path, option, _ = done.stdout.split("\0")
    assert Path(path) == Path(name)
    assert not path.startswith("-"), "a program would take it for an option"
    assert option == f"m={name}"


@pytest.mark.parametrize("name", ODD)
def test_what_is_offered(name: str) -> None:
    assert shlex.split(serve_command("m", Path(name), (1 << 20) + 1)) == [
        "expertd", "serve", "--ram", "2MiB", "--model", f"m={name}",
    ]  # fmt: skip
    (offered,) = [part for part in how_to_start(Path("/run", name)).split("`") if " serve" in part]
    assert shlex.split(offered)[2:4] == ["--socket", f"/run/{name}"]

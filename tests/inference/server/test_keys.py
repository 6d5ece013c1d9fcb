"""The file of keys, and the command that makes entries."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertd_inference.cli.commands import app
from expertd_inference.server.keys import Keys, digest, new_key
from expertstore.errors import ConfigError


def test_the_command_s_entry_is_the_file_s(tmp_path: Path) -> None:
    asked = ["key", "alice", "--tokens-per-minute", "20000", "--priority", "3"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    key = result.stderr.split()[-1]
    path = tmp_path / "keys.toml"
    path.write_text(result.stdout)
    assert key not in result.stdout
    found = Keys(path).find(key)
    assert found is not None
    name, limits = found
    assert (name, limits.tokens_per_minute, limits.priority) == ("alice", 20000, 3)
    assert Keys(path).find(key + "x") is None
    assert Keys(path).find("") is None


def test_a_name_that_is_none() -> None:
    assert CliRunner().invoke(app, ["key", "a.b"]).exit_code != 0


def test_a_changed_file_counts_from_the_next_request_on(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first, second = new_key(), new_key()
    path.write_text(f'[keys.a]\nsha256 = "{digest(first)}"\n')
    keys = Keys(path)
    assert keys.find(first) is not None
    path.write_text(f'[keys.b]\nsha256 = "{digest(second)}"\npriority = 1\n')
    assert keys.find(first) is None
    assert keys.find(second) is not None
    path.write_text("[keys.b\n")
    os.utime(path, ns=(1, 1))
    assert keys.find(second) is not None
    assert keys.complaint is not None
    path.write_text(f'[keys.a]\nsha256 = "{digest(first)}"\n')
    assert keys.find(first) is not None
    assert keys.complaint is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[keys.a]",
        "[keys.a]\nsha256 = 'short'",
        f"[keys.a]\nsha256 = '{'Z' * 64}'",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nrequest_per_minute = 3",
        "\x00",
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"The keys in .* cannot be used"):
        Keys(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Keys(tmp_path / "none.toml")

"""The file of keys, and the command that makes entries."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertd_inference.cli.commands import app
from expertd_inference.server.keys import Keys, check_key, digest, new_key
from expertstore.errors import ConfigError, InvalidInputError


def test_the_command_s_entry_is_the_file_s(tmp_path: Path) -> None:
    asked = ["key", "alice", "--tokens-per-minute", "1234567", "--priority", "3"]
    asked += ["--requests-per-minute", "0.5", "--max-sequences", "2"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    key = result.stderr.split()[-1]
    path = tmp_path / "keys.toml"
    path.write_text(result.stdout)
    assert key not in result.stdout
    found = Keys(path).find(key)
    assert found is not None
    name, limits = found
    assert name == "alice"
    assert (limits.requests_per_minute, limits.tokens_per_minute) == (0.5, 1234567)
    assert (limits.max_sequences, limits.priority) == (2, 3)
    assert Keys(path).limits_of("alice") == limits
    assert Keys(path).limits_of("bob") is None
    assert Keys(path).find(key + "x") is None
    assert Keys(path).find("") is None


def test_names() -> None:
    assert CliRunner().invoke(app, ["key", "a-b_c"]).stdout.startswith("[keys.a-b_c]\n")
    for name in ("a.b", "", "ä"):
        assert CliRunner().invoke(app, ["key", name]).exit_code != 0


def test_limits_that_let_nobody_ask() -> None:
    for limit in ("--requests-per-minute", "--tokens-per-minute", "--max-sequences"):
        assert CliRunner().invoke(app, ["key", "a", limit, "0"]).exit_code != 0


def test_a_changed_file_counts_from_the_next_request_on(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first, second = new_key(), new_key()
    path.write_text(f'[keys.a]\nsha256 = "{digest(first)}"\n')
    keys = Keys(path)
    assert keys.find(first) is not None
    path.write_text(f'[keys.b]\nsha256 = "{digest(second)}"\npriority = 1\n')
    assert keys.find(first) is None
    assert keys.find(second) is not None
    for number, wrong in enumerate(("[keys.b\n", "[keys.b]\nsha256 = 'short'\n"), 1):
        path.write_text(wrong)
        os.utime(path, ns=(number, number))
        for _ in range(2):
            assert keys.find(second) is not None
            assert keys.complaint is not None
    path.write_text(f'[keys.a]\nsha256 = "{digest(first)}"\n')
    assert keys.find(first) is not None
    assert keys.complaint is None


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_file_or_none_has_no_keys_any_more(tmp_path: Path, empty: str | None) -> None:
    path = tmp_path / "keys.toml"
    key = new_key()
    entry = f'[keys.a]\nsha256 = "{digest(key)}"\n'
    path.write_text(entry)
    keys = Keys(path)
    assert keys.find(key) is not None
    aside = path.rename(tmp_path / "aside")
    if empty is not None:
        path.write_text(empty)
    for _ in range(2):
        assert keys.find(key) is None
        assert keys.complaint is not None
        assert "is empty or gone: nobody has a key" in keys.complaint
    # The file that was there before, with its time.
    aside.rename(path)
    assert keys.find(key) is not None
    assert keys.complaint is None


def test_a_file_that_cannot_be_read_any_more_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = new_key()
    path.write_text(f'[keys.a]\nsha256 = "{digest(key)}"\n')
    keys = Keys(path)
    path.unlink()
    path.mkdir()
    assert keys.find(key) is not None
    assert "The keys that were read before still count" in (keys.complaint or "")


def test_a_key_that_no_header_can_carry() -> None:
    for key in ("a\nb", "kéy", "a\x7f"):
        with pytest.raises(InvalidInputError, match="has a line's end, or a character that is not"):
            check_key(key)
    check_key(None)
    check_key(new_key())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[keys.a]",
        "[keys.a]\nsha256 = 'short'",
        f"[keys.a]\nsha256 = '{'Z' * 64}'",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nrequest_per_minute = 3",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nrequests_per_minute = 0",
        f"[keys.a]\nsha256 = '{'0' * 64}'\ntokens_per_minute = -1.0",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nmax_sequences = 0",
        f"[keys.a]\nsha256 = '{'0' * 63}'",
        f"[keys.a]\nsha256 = '{'0' * 64}'\npriority = {10**10}",
        "\x00",
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"The keys in .* cannot be used"):
        Keys(path)


def test_a_file_is_read_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    assert set(digest("before")) == set("0123456789abcdef"), "any hash is one"
    entry = f'[keys.a]\nsha256 = "{digest("before")}"\n'
    path.write_text(entry)
    os.utime(path, ns=(1, 1))
    keys = Keys(path)
    path.write_text(entry.replace(digest("before"), digest("new")))
    os.utime(path, ns=(1, 1))
    assert keys.find("before") is not None
    os.utime(path, ns=(2, 2))
    assert keys.find("new") is not None


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Keys(tmp_path / "none.toml")

"""Outputs that take nothing more are told in a sentence, and only where that matters."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from expertd_inference.cli.text_output import TextOutput, complain, progress
from expertstore.errors import PreconditionError


@pytest.fixture
def full() -> Iterator[TextIO]:
    """A stream with no room."""
    stream = Path("/dev/full").open("w")  # noqa: SIM115 - its close fails, too
    yield stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    stream.close()


def test_a_full_disk(full: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    output = TextOutput(json=False, stream=False)
    assert output.write is not None
    with pytest.raises(PreconditionError, match="No space left on device; what was generated"):
        output.write("Once")
    with pytest.raises(PreconditionError, match="No space"):
        output.end(b"{}")


def test_text_beside_json_on_a_full_disk(full: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    output = TextOutput(json=True, stream=True)
    assert output.write is not None
    with pytest.raises(PreconditionError, match="No space"):
        output.write("Once")


def test_a_reader_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(BrokenPipeError):
        TextOutput(json=False, stream=False).end(b"{}")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_no_output_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(PreconditionError, match="stdout is closed"):
        TextOutput(json=False, stream=False)


def test_complaints_that_nobody_hears(full: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    complain("daemon gone")
    complain("and again")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_what_is_done_and_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with progress(4, 1) as advance:
        advance("7.5 tokens/s")
    assert "2/4" in shown.getvalue()
    assert "7.5 tokens/s" in shown.getvalue()


def test_a_bar_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4) as advance:
        advance("7.5 tokens/s")
    assert capsys.readouterr() == ("", "")

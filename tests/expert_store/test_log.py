"""The log: one line an event, whatever a client puts into its fields."""

import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from expertd.log import LogFormat, log, log_error, log_failure, log_warning, open_log


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """The logger as it was before and after each test."""
    logger = logging.getLogger("expertd")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_a_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    open_log()
    log("attached", session=3, model="m")
    log("refused", cause="two words", name="a\nforged", empty="")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("expertd: attached session=3 model=m")
    assert second.endswith(r"refused cause='two words' name='a\nforged' empty=")


def fail() -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        log_failure("dividing by zero")


def test_levels_are_named_unless_they_are_info(capsys: pytest.CaptureFixture[str]) -> None:
    open_log()
    log_warning("cut off", session=1)
    log_error("lost")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" expertd: warning: cut off session=1")
    assert second.endswith(" expertd: error: lost")


def test_a_failure_is_one_line_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    open_log()
    fail()
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: unexpected failure doing='dividing by zero' traceback='Traceback" in line
    assert line.endswith(r"\nZeroDivisionError: by zero'")


def test_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    open_log(LogFormat.JSON)
    before = time.time()
    log("attached", session=3, lag=0.5, direct=True, path=Path("/p"), cause=OSError("a\nb"))
    log_warning("odd", name="\udcff\u2028", nothing=None)
    fail()
    first, second, third = map(json.loads, capsys.readouterr().err.split("\n")[:-1])
    assert list(first) == ["ts", "level", "event", "fields"]
    assert before - 1 < datetime.fromisoformat(first.pop("ts")).timestamp() < before + 60
    assert first == {
        "level": "info",
        "event": "attached",
        "fields": {"session": 3, "lag": 0.5, "direct": True, "path": "/p", "cause": "a\nb"},
    }
    assert second["level"] == "warning"
    assert second["fields"] == {"name": "\\udcff\u2028", "nothing": None}
    assert third["level"] == "error"
    assert third["fields"]["traceback"].endswith("\nZeroDivisionError: by zero")


@pytest.mark.parametrize("form", LogFormat)
def test_the_journal_gets_priorities_and_no_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: LogFormat
) -> None:
    file = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino}")
    open_log(form)
    log("attached", session=3)
    log_warning("cut off")
    fail()
    lines = capsys.readouterr().err.splitlines()
    assert [line[:3] for line in lines] == ["<6>", "<4>", "<3>"]
    if form is LogFormat.TEXT:
        assert lines[0] == "<6>expertd: attached session=3"
    else:
        assert json.loads(lines[0][3:])["event"] == "attached"


def test_another_journal_stream_is_not_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")  # inherited, with stderr sent elsewhere
    open_log()
    log("attached")
    assert not capsys.readouterr().err.startswith("<")

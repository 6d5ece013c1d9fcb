"""The log: one line an event, whatever a client puts into its fields."""

import logging
import os
from collections.abc import Iterator

import pytest

from expertd.log import log, log_failure, open_log


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


def test_a_failure_comes_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    open_log()
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        log_failure("dividing by zero")
    lines = capsys.readouterr().err.splitlines()
    assert "doing='dividing by zero'" in lines[0]
    assert lines[-1] == "ZeroDivisionError: by zero"


def test_the_journal_gets_priorities_and_no_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino}")
    open_log()
    log("attached", session=3)
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        log_failure("dividing by zero")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "<6>expertd: attached session=3"
    assert len(rest) > 2
    assert all(line.startswith("<3>") for line in rest)


def test_another_journal_stream_is_not_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")  # inherited, with stderr sent elsewhere
    open_log()
    log("attached")
    assert not capsys.readouterr().err.startswith("<")

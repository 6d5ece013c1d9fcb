"""The log: one line an event, whatever a client puts into its fields."""

import logging
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

"""The daemon's log: one line an event on stderr, ``key=value`` pairs behind the event."""

import logging
import sys

_logger = logging.getLogger("expertd")


def log(event: str, /, **fields: object) -> None:
    """Writes one event."""
    pairs = "".join(f" {key}={_quote(value)}" for key, value in fields.items())
    _logger.info("%s%s", event, pairs)


def log_failure(doing: str) -> None:
    """Writes the exception that is being handled, a bug of ours, with its traceback."""
    _logger.exception("unexpected failure doing=%s", _quote(doing))


def open_log() -> None:
    """Sends the log to stderr, as the daemon does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s expertd: %(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def _quote(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text.isprintable() else text

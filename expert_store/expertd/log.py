"""The daemon's log: one line an event on stderr, ``key=value`` pairs behind the event.

Where stderr is systemd's journal, which keeps the time itself, lines begin with their priority
instead (sd-daemon(3)), so that ``journalctl -p err`` finds our failures.
"""

import logging
import os
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
    handler.setFormatter(
        _JournalFormatter("expertd: %(message)s")
        if _is_journal(2)
        else logging.Formatter("%(asctime)s expertd: %(message)s")
    )
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


class _JournalFormatter(logging.Formatter):
    """A priority before each line: the journal takes a traceback for many messages."""

    def format(self, record: logging.LogRecord) -> str:
        priority = "<3>" if record.levelno >= logging.ERROR else "<6>"
        return "\n".join(priority + line for line in super().format(record).splitlines())


def _is_journal(descriptor: int) -> bool:
    """Whether that leads straight to the journal (systemd.exec(5), ``JOURNAL_STREAM``)."""
    file = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def _quote(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text.isprintable() else text

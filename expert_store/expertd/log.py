"""The daemon's log: one line an event on stderr, whatever its fields hold.

As text, ``key=value`` pairs behind the event; or as JSON, an object a line with ``ts``, ``level``,
``event`` and ``fields``. Names of events and fields are a contract: docs/operating.md has them.

Where stderr is systemd's journal, which keeps the time itself, lines begin with their priority
instead (sd-daemon(3)), so that ``journalctl -p err`` finds our failures. A traceback is a field
like others, its line breaks escaped: the journal would take each of its lines for a message.
"""

import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from enum import StrEnum

import msgspec

_logger = logging.getLogger("expertd")
_PRIORITIES = {logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class LogFormat(StrEnum):
    """How the log is written."""

    TEXT = "text"
    """For people, and the journal."""
    JSON = "json"
    """For log collectors."""


def log(event: str, /, **fields: object) -> None:
    """Writes what happened in order."""
    _write(logging.INFO, event, fields)


def log_warning(event: str, /, **fields: object) -> None:
    """Writes what somebody should look at when there is time."""
    _write(logging.WARNING, event, fields)


def log_error(event: str, /, **fields: object) -> None:
    """Writes what fails requests or loses bytes."""
    _write(logging.ERROR, event, fields)


def log_failure(doing: str) -> None:
    """Writes the exception that is being handled, a bug of ours, with its traceback."""
    fields: dict[str, object] = {"doing": doing, "traceback": traceback.format_exc().rstrip()}
    _write(logging.ERROR, "unexpected failure", fields)


def open_log(form: LogFormat = LogFormat.TEXT) -> None:
    """Sends the log to stderr, as the daemon does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form, in_journal=_is_journal(2)))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def _write(level: int, event: str, fields: dict[str, object]) -> None:
    _logger.log(level, "%s%s", event, _Pairs(fields), extra={"event": event, "fields": fields})


class _Pairs:
    """Fields as text, made only if somebody writes them so."""

    def __init__(self, fields: dict[str, object]) -> None:
        self._fields = fields

    def __str__(self) -> str:
        return "".join(f" {key}={_quote(value)}" for key, value in self._fields.items())


class _Formatter(logging.Formatter):
    def __init__(self, form: LogFormat, *, in_journal: bool) -> None:
        super().__init__()
        self._form, self._in_journal = form, in_journal

    def format(self, record: logging.LogRecord) -> str:
        line = self._as_json(record) if self._form is LogFormat.JSON else self._as_text(record)
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{line}" if self._in_journal else line

    def _as_text(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"expertd: {level}{record.getMessage()}"
        return line if self._in_journal else f"{self.formatTime(record)} {line}"

    def _as_json(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.getMessage()),
            "fields": {key: _plain(value) for key, value in getattr(record, "fields", {}).items()},
        }
        return msgspec.json.encode(line).decode()


def _is_journal(descriptor: int) -> bool:
    """Whether that leads straight to the journal (systemd.exec(5), ``JOURNAL_STREAM``)."""
    file = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def _plain(value: object) -> object:
    """A number as it is, all else as text that any encoder takes."""
    if isinstance(value, bool | int | float) or value is None:
        return value
    return str(value).encode(errors="backslashreplace").decode()


def _quote(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text.isprintable() else text

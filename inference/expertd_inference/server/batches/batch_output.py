"""A file of answers in OpenAI's batch format, to which whole lines are appended."""

import fcntl
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from expertstore.errors import InvalidInputError, PreconditionError

_BEGINNING = b'{"id":"batch_req_'
"""Of every line, so that a torn one is known for one."""


class LineResponse(msgspec.Struct, frozen=True):
    """What a server answered to one request; ``body`` is JSON, or a text where it was none."""

    status_code: int
    request_id: str
    body: Any


class LineError(msgspec.Struct, frozen=True):
    """Why a request was not asked."""

    code: str
    message: str


class AnswerLine(msgspec.Struct, frozen=True):
    """What became of one request; it has a ``response`` or an ``error``."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineError | None

    @property
    def failed(self) -> bool:
        """Whether there is no answer but a reason why."""
        return self.response is None or self.response.status_code >= 400


class _Status(msgspec.Struct):
    status_code: int


class _Written(msgspec.Struct):
    """What is read again of a line."""

    id: str
    custom_id: str
    response: _Status | None


def new_line(
    custom_id: str, response: LineResponse | None, error: LineError | None = None
) -> AnswerLine:
    """A line with an id of its own."""
    return AnswerLine(f"batch_req_{secrets.token_hex(16)}", custom_id, response, error)


class BatchOutput:
    """Answers to a batch, in a file that has each line whole or not at all.

    One process at a time has it open. A line that was torn when its writer was killed is cut off
    when the file is opened again; ``answered`` has the custom_id of each whole one, and whether it
    failed.
    """

    def __init__(self, path: Path) -> None:
        """Raises InvalidInputError for a file of something else.

        Raises PreconditionError if the file is open elsewhere, or cannot be written.
        """
        self._path = path
        self.answered: dict[str, bool] = {}
        self.num_failed = 0
        """How many of its lines have no answer but a reason."""
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise PreconditionError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            self._claim()
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "BatchOutput":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, line: AnswerLine) -> None:
        """Raises PreconditionError if the file takes no more; then it is as it was."""
        data = msgspec.json.encode(line) + b"\n"
        end = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            # Another line may follow.
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise PreconditionError(
                f"{self._path} cannot be written: {error.strerror}; start again once it can, and "
                "what is missing is asked."
            ) from error
        self._count(line.custom_id, failed=line.failed)

    def split(self, answers: Path, errors: Path) -> None:
        """Copies its lines: those of requests that failed to ``errors``, others to ``answers``.

        Raises OSError; then there are no such files.
        """
        try:
            self._split(answers, errors)
        except OSError:
            for path in (answers, errors):
                path.unlink(missing_ok=True)
            raise

    def _split(self, answers: Path, errors: Path) -> None:
        with (
            open(self._descriptor, "rb", closefd=False) as file,
            answers.open("wb") as good,
            errors.open("wb") as bad,
        ):
            file.seek(0)
            for line in file:
                custom_id = msgspec.json.decode(line, type=_Written).custom_id
                (bad if self.answered[custom_id] else good).write(line)

    def close(self) -> None:
        """Lets another process have the file. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _claim(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise InvalidInputError(
                f"{self._path} is no file whose lines can be read again; name one."
            )
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreconditionError(
                f"{self._path} is being written by another run; wait for its end, or name another "
                "file."
            ) from error

    def _read(self) -> None:
        whole = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and _is_torn(line):
                    os.ftruncate(self._descriptor, whole)
                    return
                try:
                    written = msgspec.json.decode(line, type=_Written)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise InvalidInputError(
                        f"{self._path}, line {number}: it is no answer of a batch ({error}); name "
                        "another file for the answers."
                    ) from error
                failed = written.response is None or written.response.status_code >= 400
                self._count(written.custom_id, failed=failed)
                whole += len(line)

    def _count(self, custom_id: str, *, failed: bool) -> None:
        self.answered[custom_id] = failed
        self.num_failed += failed


def _is_torn(line: bytes) -> bool:
    """Whether a line without an end is the beginning of one of ours."""
    return line[: len(_BEGINNING)] == _BEGINNING[: len(line)]

"""What the command shows: the new text while it comes, and what is said in between."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from expertstore.errors import PreconditionError


class TextOutput:
    """Where new text goes while it comes, if anywhere, and what is said in between."""

    def __init__(self, *, json: bool, stream: bool) -> None:
        """Raises PreconditionError if there is no stdout."""
        if sys.stdout is None:
            raise PreconditionError("There is nowhere to write to: stdout is closed.")
        self._output = sys.stderr if json else sys.stdout
        self._silent = json and not stream
        self._in_line = False
        if isinstance(self._output, io.TextIOWrapper):
            # A terminal that cannot show a character is no reason to stop.
            self._output.reconfigure(errors="replace")

    @property
    def write(self) -> Callable[[str], None] | None:
        """What takes the text, piece by piece; None if nobody wants it."""
        return None if self._silent else self._write

    def say(self, message: str) -> None:
        """A line on stderr."""
        self.end_line()
        complain(message)

    def end(self, result: bytes | None) -> None:
        """Ends the output: with ``result``, a line of JSON, or where none is wanted with a line.

        Raises PreconditionError, as :attr:`write` does, if stdout takes no more.
        """
        if result is not None:
            with _writing():
                sys.stdout.buffer.write(result + b"\n")
                sys.stdout.buffer.flush()
        elif not sys.stdout.isatty():
            self._write("\n")

    def end_line(self) -> None:
        """Lets what stderr says begin a line of its own, where both are seen together."""
        if self._in_line and (self._output is sys.stderr or self._output.isatty()):
            self._write("\n")

    def _write(self, text: str) -> None:
        with _writing():
            self._output.write(text)
            self._output.flush()
        self._in_line = not text.endswith("\n")


def complain(message: str) -> None:
    """A line on stderr, if that takes it: that it does not is no reason to do anything else."""
    try:
        sys.stderr.write(f"expert-run: {message}\n")
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def prepare_streams() -> None:
    """Opens those of stdin, stdout and stderr that the caller has closed, to nothing.

    Otherwise the next file to be opened would be taken for them.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            if name != "stdout":  # whose absence is told to who would write there
                setattr(sys, name, open(descriptor, mode))  # noqa: PTH123, SIM115


def discard(stream: TextIO) -> None:
    """Lets nothing more go to ``stream``, whose reader left: Python flushes it at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PreconditionError(
            f"The output cannot be written: {error.strerror}; what was generated is lost."
        ) from error


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(what):
            yield
    else:
        yield


@contextmanager
def progress(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, ``done`` of it already; nothing elsewhere.

    The call that is given moves it on by one, and shows a word, such as a rate.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda word: bar.update(task, advance=1, description=word)

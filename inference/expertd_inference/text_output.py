"""What the command shows: the new text while it comes, and what is said in between."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


class TextOutput:
    """Where new text goes while it comes, if anywhere, and what is said in between."""

    def __init__(self, *, json: bool, stream: bool) -> None:
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
        sys.stderr.write(f"expert-run: {message}\n")
        sys.stderr.flush()

    def end_line(self) -> None:
        """Lets what stderr says begin a line of its own, where both are seen together."""
        if self._in_line and (self._output is sys.stderr or self._output.isatty()):
            self._write("\n")

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()
        self._in_line = not text.endswith("\n")


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(what):
            yield
    else:
        yield

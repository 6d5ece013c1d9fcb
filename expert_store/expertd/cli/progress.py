"""How far a long command is: a bar on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from expertstore.sizes import format_bytes

LINE_SECONDS = 5.0


class ProgressDisplay:
    """Shows bytes done of all, their rate and the time left, on stderr; a context manager."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._started: float | None = None
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=None, text="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, sentence: str) -> None:
        """Prints a sentence among the progress."""
        if self._bar is not None:
            self._bar.console.print(sentence, highlight=False, soft_wrap=True)
        else:
            print(sentence, file=sys.stderr, flush=True)  # noqa: T201

    def update(self, done: int, total: int, text: str, *, skipped: int = 0) -> None:
        """``done`` of ``total`` bytes, of which ``skipped`` were done before the command."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
        rate = (done - skipped) / max(now - self._started, 1e-3)
        timing = ""
        if done > skipped:
            timing = f"{format_bytes(int(rate))}/s, {format_seconds((total - done) / rate)} left"
        self._show(done, total, ", ".join(filter(None, (text, timing))), now)

    def update_count(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` of what is no bytes, such as ``rows``."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
        left = (total - done) * (now - self._started) / max(done, 1)
        self._show(done, total, f"{done} of {total} {what}, {format_seconds(left)} left", now)

    def _show(self, done: int, total: int, line: str, now: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=line)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            percent = 100 * done // max(total, 1)
            print(f"{self._title}: {percent} %, {line}", file=sys.stderr, flush=True)  # noqa: T201


def format_seconds(seconds: float) -> str:
    """``75.2`` as ``1:15``, and hours before minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""Single keys from a terminal, without Enter."""

import os
import select
import sys
import termios
import tty
from types import TracebackType
from typing import Self


class Keys:
    """What is pressed while the block lasts; nothing if stdin is no terminal."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._before: list[object] = []

    def __enter__(self) -> Self:
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def pressed(self) -> str:
        """All keys since the last call; never waits."""
        if self._fd < 0 or not select.select([self._fd], [], [], 0)[0]:
            return ""
        pressed = os.read(self._fd, 64)
        if not pressed:
            self._fd = -1  # the terminal is gone
        return pressed.decode(errors="replace")

"""The right to compute on cores that other engines compute on as well."""

import threading
from collections.abc import Callable
from typing import Protocol


class StepTurn(Protocol):
    """Around an engine's steps; its thread calls both."""

    def take(self) -> None:
        """Returns once a step may be computed."""

    def leave(self) -> None:
        """No step is to be computed for now, or the one that is computed waits for something."""


class Always:
    """Of an engine with cores of its own."""

    def take(self) -> None:
        """At once."""

    def leave(self) -> None:
        """Nobody else wants it."""


ALWAYS = Always()


class GrantedTurn:
    """Of an engine whose turn somebody else grants, and may want back after a step.

    ``say(True)`` says that there is a step to compute, and gives back the turn if there is one;
    ``say(False)`` gives it back.
    """

    def __init__(self, say: Callable[[bool], None]) -> None:
        self._say = say
        self._mine = False
        self._granted = threading.Event()
        self._recalled = False
        self._free = False

    def take(self) -> None:
        """Of StepTurn."""
        if self._mine and not self._recalled:
            return
        self._granted.clear()  # and looks then whether anybody grants
        if self._free:
            return
        self._say(True)
        self._granted.wait()
        self._mine = True

    def leave(self) -> None:
        """Of StepTurn."""
        if self._mine:
            self._mine = False
            self._say(False)

    def grant(self) -> None:
        """For another thread: it is this engine's turn."""
        self._recalled = False
        self._granted.set()

    def recall(self) -> None:
        """For another thread: another engine's turn is after this step."""
        self._recalled = True

    def free(self) -> None:
        """For another thread: nobody grants turns any more, and each step may be computed."""
        self._free = True
        self._granted.set()

"""How Ctrl-C, SIGTERM and a closed terminal end a command, at every moment of it.

From a command's first instruction on (:func:`end_at_once`), and whenever it imports
(:func:`importing`), they end the process by their default action: there is nothing to put away,
and an exception in the midst of an import would be a traceback or, inside torch's C++, an abort.
Where a command has begun something (:func:`interruptible`), they are exceptions, so that it is put
away; a second signal ends the process at once. An event loop would lose a callback to an exception
in its own code, so it calls the handlers itself (:func:`between_callbacks`).
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which takes longer than what comes before end_at_once may
    from asyncio import AbstractEventLoop

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], object] | int | None


def end_at_once() -> None:
    """From now on these signals end the process; one that its starter has it ignore stays so."""
    _handle(_default_action())


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block Ctrl-C is KeyboardInterrupt, and SIGTERM and SIGHUP are SystemExit.

    Whatever leaves the block after one of them, such as an error of what was cut short, becomes
    SystemExit with the signal's exit code. What the signals did before the block, they do after it.
    """
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        _handle(_default_action())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(exit_code(number))

    before = _handle(interrupt)
    try:
        yield
    except BaseException:
        if came:
            raise SystemExit(exit_code(came[0])) from None
        raise
    finally:
        _restore(before)


@contextmanager
def between_callbacks(loop: "AbstractEventLoop") -> Iterator[None]:
    """In the block ``loop``, which runs, calls the handlers of these signals like its callbacks.

    What a handler raises ends the loop's run, while no task is in the midst of anything.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = {number: handler for number, handler in before.items() if callable(handler)}
    for number, handler in taken.items():
        loop.add_signal_handler(number, handler, number, None)
    inside = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        for number, handler in taken.items():
            now = signal.getsignal(number)
            loop.remove_signal_handler(number)
            signal.signal(number, handler if now is inside[number] else now)


@contextmanager
def importing(what: str) -> Iterator[None]:
    """In the block, which imports ``what``, these signals end the process at once.

    A terminal shows what is waited for; a line without a spinner, whose thread would slow the
    imports down, and which hides the cursor.
    """
    shown = sys.stderr.isatty()
    if shown:
        sys.stderr.write(f"Loading {what} ...")
        sys.stderr.flush()
    before = _handle(_default_action())
    try:
        yield
    finally:
        _restore(before)
        if shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def exit_code(number: int) -> int:
    """As a shell shows the end by a signal."""
    return 128 + number


def _default_action() -> _Handler:
    if os.getpid() != 1:
        return signal.SIG_DFL
    # A container's first process has no default actions.
    return lambda number, _: os._exit(exit_code(number))


def _handle(handler: _Handler) -> dict[int, _Handler]:
    """Has ``handler`` take the signals that are not ignored; what took them before."""
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in taken}


def _restore(before: dict[int, _Handler]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)

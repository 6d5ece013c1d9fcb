"""What a worker does when its session ends under it: attach again, and go on.

Three errors mean that: the daemon cut the session off (SessionLostError), it is gone
(UnavailableError), or another one answers (IncarnationError). Whoever computes catches
:data:`SESSION_ENDED`, discards the result that it has not yet been granted, calls
:meth:`Recovery.recover`, and repeats.
"""

import sys
import time
from collections.abc import Callable

from expertd_inference.experts.source import ExpertSource
from expertstore.errors import IncarnationError, SessionLostError, UnavailableError

SESSION_ENDED = (SessionLostError, UnavailableError, IncarnationError)

QUIET_SECONDS = 0.5
"""How long attaching again after a cut-off may take before it is worth a word."""

MAX_FUTILE_RECOVERIES = 16
"""So often may the same step end in a lost session before that is an error.

The daemon cuts off who holds records for too long. The step is made smaller each time, so
one that still does not fit is not going to.
"""


class Recovery:
    """Attaches ``source`` again, for at most ``reattach_seconds`` per outage.

    ``say`` is told about an outage once, and once that it is over.
    """

    def __init__(
        self,
        source: ExpertSource,
        *,
        reattach_seconds: float,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.reattach_seconds = reattach_seconds
        self._source = source
        self._say = say or say_on_stderr
        self._futile = 0

    def progressed(self) -> None:
        """A step was completed: what happened before it no longer counts."""
        self._futile = 0

    def recover(self, error: Exception) -> None:
        """Returns with the source attached again, or raises.

        UnavailableError if no daemon answers in time; PreconditionError if the one that
        answers serves another pack; ``error`` itself if recovering from it does not help.
        """
        self._futile += 1
        if self._futile > MAX_FUTILE_RECOVERIES:
            raise error
        deadline = time.monotonic() + self.reattach_seconds
        if isinstance(error, SessionLostError):
            try:
                self._source.reattach(QUIET_SECONDS)
            except UnavailableError:
                pass
            else:
                return
        if self.reattach_seconds <= 0:
            raise UnavailableError("The daemon is gone.") from error
        self._say("daemon gone, waiting to re-attach")
        try:
            self._source.reattach(max(0.0, deadline - time.monotonic()))
        except UnavailableError as unavailable:
            raise UnavailableError(
                f"The daemon is gone and none came back within {self.reattach_seconds:g} s; "
                "start it and run this again, or wait longer with --reattach-seconds."
            ) from unavailable
        self._say("re-attached")


def say_on_stderr(message: str) -> None:
    """A line, where nobody else wants to be told."""
    sys.stderr.write(f"expert-run: {message}\n")
    sys.stderr.flush()

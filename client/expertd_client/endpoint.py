"""Where the daemon's RPCs are, and how a channel to them is set up."""

import os
import time
from collections.abc import Iterator

from expertstore.errors import PreconditionError

Metadata = tuple[tuple[str, str], ...]

# GetModel of a model with many thousand experts is under 1 MiB; far more is no model.
MAX_RESPONSE_BYTES = 64 << 20

# A daemon that restarts is back within a second, on a socket whose attempts cost nothing;
# gRPC's own backoff is for servers far away and would wait up to two minutes.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 250),
)

# What is left of a deadline when it has just passed: one attempt is always made.
MIN_TIMEOUT_SECONDS = 0.05
FIRST_RETRY_SECONDS = 0.01
LAST_RETRY_SECONDS = 0.5


def retry_delays(timeout_seconds: float) -> Iterator[float]:
    """How long to wait before each further attempt, until ``timeout_seconds`` are over."""
    deadline = time.monotonic() + timeout_seconds
    delay = FIRST_RETRY_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        yield min(delay, left)
        delay = min(2 * delay, LAST_RETRY_SECONDS)


def check_own_process(pid: int) -> None:
    """Raises PreconditionError in a fork of process ``pid``.

    A channel does not survive a fork: it would wait for ever for threads that only the
    parent has.
    """
    if os.getpid() != pid:
        raise PreconditionError(
            f"This client belongs to process {pid}, of which this one is a fork; start workers "
            "with multiprocessing's spawn method, and make a client in each."
        )

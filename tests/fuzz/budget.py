"""How many examples: few in CI, many in ``make soak``."""

import os

from hypothesis import HealthCheck, settings

MAX_GROWTH_BYTES = 64 << 20
"""Of the daemon, over all that is sent to it."""


def bounded(num_examples: int) -> settings:
    """Settings for that many examples, times FUZZ_TIMES of the environment."""
    return settings(
        max_examples=num_examples * int(os.environ.get("FUZZ_TIMES", "1")),
        # A daemon in another process, on a machine that does other things: slow is no failure
        # here, and a test of latency is elsewhere.
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

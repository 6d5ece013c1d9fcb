"""What tests wait for and count."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def num_arenas() -> int:
    """Mappings of daemons' arenas in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:expertd-arena")


def num_open_files() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a path object each is no gain

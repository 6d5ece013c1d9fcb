"""How long things took, counted in buckets: cheap enough for every fetch and read."""

from bisect import bisect_left
from itertools import accumulate

BOUNDS_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""From a page-cache read of a small record to the longest that a fetch may wait by default."""


class Histogram:
    """Durations in seconds. Not locked: observe and read it on one thread."""

    def __init__(self) -> None:
        self.sum_seconds = 0.0
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)

    def __repr__(self) -> str:
        return f"Histogram({self.count} in {self.sum_seconds:.3f} s)"

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self._counts)

    def observe(self, seconds: float) -> None:
        """Counts one duration; a bound belongs to the bucket below it."""
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds

    def cumulative(self) -> list[int]:
        """For each bound, and last without one, how many took at most that long."""
        return list(accumulate(self._counts))

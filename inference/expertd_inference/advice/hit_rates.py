"""Which share of a token's experts is in RAM, by the share of all experts that is.

``UNIFORM``, the worst case: every expert is as likely as every other, so no cache can hit more
often than its share. ``TYPICAL``, of trained models: what the daemon's default policy hits in
decoding, replayed over one real run each of Qwen3-30B-A3B and gpt-oss-120b (routing published by
the BigMoeOnEdge project, Apache-2.0), in the mean of the two. First uses count as misses, as in
a conversation that has just begun. ``make bench`` replays such traces again.
"""

from bisect import bisect_right
from enum import StrEnum


class Routing(StrEnum):
    """How experts are asked for."""

    UNIFORM = "uniform"
    TYPICAL = "typical"


_TYPICAL = (
    (0.0, 0.0),
    (0.05, 0.439),
    (0.10, 0.602),
    (0.15, 0.702),
    (0.25, 0.822),
    (0.35, 0.889),
    (0.50, 0.929),
    (1.0, 1.0),
)
"""Share held, share hit."""


def hit_rate(share: float, routing: Routing) -> float:
    """Hits per access with ``share`` of all experts held, both from 0 to 1."""
    share = min(max(share, 0.0), 1.0)
    if routing is Routing.UNIFORM:
        return share
    above = bisect_right(_TYPICAL, (share, 1.0))
    if above == len(_TYPICAL):
        return 1.0
    (x0, y0), (x1, y1) = _TYPICAL[above - 1], _TYPICAL[above]
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)

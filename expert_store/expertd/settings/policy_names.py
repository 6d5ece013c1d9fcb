"""The names of the residency policies, for settings and commands that need no numpy yet."""

from enum import StrEnum


class PolicyName(StrEnum):
    """What the setting ``policy`` takes; :mod:`expertd.residency` has the classes."""

    LRU = "lru"
    LRU_PER_LAYER = "lru-per-layer"
    AGED = "aged"
    DENSITY = "density"


DEFAULT_POLICY = PolicyName.DENSITY
"""The best of them on every trace tried (docs/residency.md)."""

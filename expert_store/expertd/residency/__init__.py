"""Residency: which records are worth their RAM.

A :class:`Policy` per model says so; ``expertd.hosting.slots`` evicts by it, and ``expertd replay``
shows how it does on a trace (``docs/residency.md``).
"""

from collections.abc import Sequence

from expertd.residency.aged import Aged
from expertd.residency.density import Density
from expertd.residency.lru import Lru, LruPerLayer
from expertd.residency.policy import HALF_LIFE_TOKENS, Entries, Policy, Values
from expertd.settings.policy_names import DEFAULT_POLICY

__all__ = [
    "DEFAULT_POLICY",
    "HALF_LIFE_TOKENS",
    "POLICIES",
    "Entries",
    "Policy",
    "Values",
    "make_policy",
]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Lru, LruPerLayer, Aged, Density)
}
"""By the names that the setting ``policy`` takes. Add your own here to serve and replay with it."""


def make_policy(name: str, num_experts: Sequence[int], experts_per_token: Sequence[int]) -> Policy:
    """A policy that has seen nothing, for a model of those layers."""
    return POLICIES[name](num_experts, experts_per_token)

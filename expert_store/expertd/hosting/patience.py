"""How long a fetch waits for slots before its worker is sent to the pack instead.

Mostly what others hold is free within milliseconds: when their layer ends, or their step. Then
to wait is best, since a record in the arena is there for all. But a long prompt's layer, a
debugger or a stopped process hold for seconds, and nothing but time tells them apart.
"""

from collections.abc import Sequence

GRACE_SECONDS = 0.05
"""Longer than what workers hold for a layer or a step of decoding; some reads of the disk."""
MAX_ANNEX_BYTES = 256 << 20
"""Of a worker's own memory for such records, unless one token needs more: RAM is what is short."""


def seconds_of_patience(
    *, missing: int, max_in_pack: int, wanted: int, obtainable: int, in_waves: bool = False
) -> float | None:
    """None: it waits as long as it takes.

    ``missing`` of ``wanted`` records are not resident, and the worker can read ``max_in_pack`` by
    itself; ``in_waves``: if those are too few, it would rather ask for fewer. ``obtainable`` is how
    many could be granted together if everybody let go but those that have stood still for longer
    than the grace: where that is too few, to wait is in vain.
    """
    if not max_in_pack or (missing > max_in_pack and not in_waves):
        return None
    return GRACE_SECONDS if wanted <= obtainable else 0.0


def annex_bytes(layers: Sequence[tuple[int, int, int]]) -> int:
    """How much memory of its own a worker may use for records that have no slot.

    ``layers`` have each the bytes of a record, the number of experts, and how many a token uses.
    """
    largest = max(record * num_experts for record, num_experts, _ in layers)
    token = max(record * per_token for record, _, per_token in layers)
    return min(largest, max(token, MAX_ANNEX_BYTES))

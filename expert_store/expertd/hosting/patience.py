"""How long a fetch waits for slots before its worker is sent to the pack instead.

Mostly what others hold is free within milliseconds: when their layer ends, or their step. Then
to wait is best, since a record in the arena is there for all. But a long prompt's layer, a
debugger or a stopped process hold for seconds, and nothing but time tells them apart.
"""

GRACE_SECONDS = 0.05
"""Longer than what workers hold for a layer or a step of decoding; some reads of the disk."""


def seconds_of_patience(
    *, missing: int, max_in_pack: int, wanted: int, obtainable: int
) -> float | None:
    """None: it waits as long as it takes.

    ``missing`` of ``wanted`` records are not resident, and the worker can read ``max_in_pack`` by
    itself. ``obtainable`` is how many could be granted together if everybody let go but those
    that have stood still for longer than the grace: where that is too few, to wait is in vain.
    """
    if missing > max_in_pack:
        return None
    return GRACE_SECONDS if wanted <= obtainable else 0.0

"""What an engine has done; needs no torch."""

from collections.abc import Mapping

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has done until now.

    ``executor`` computes its steps, and ``reason`` says why that one. ``num_steps`` steps had
    ``num_rows`` rows, ``rows_mean`` each in the mean (a row is one token of one sequence).
    ``prefix_queries`` are the tokens of sequences that were looked up among earlier ones' when
    they began, and ``prefix_hits`` those that were found and not computed. ``num_preemptions``
    sequences had to give up their keys and values for others and computed them again.
    ``kv_tokens`` is how many tokens have room at once, and ``kv_why`` says why so many.
    ``native_rows`` says, for each form of large matrix, up to how many rows native kernels
    multiply it before torch does; None is any number.
    """

    executor: str
    reason: str
    num_steps: int
    num_rows: int
    rows_mean: float
    num_running: int
    num_waiting: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    kv_tokens: int
    kv_why: str
    native_rows: Mapping[str, int | None]

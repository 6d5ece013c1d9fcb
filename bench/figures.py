"""What a part of the benchmark gives: figures beside their limits.

A part is a module with ``measure(bench) -> Iterator[Figure]``; :mod:`bench.store` runs the
store's, and ``python -m bench`` all. What
is ours and its limit are measured in turns, so that both meet the same seconds of a machine
that drifts; each turn gives a ratio, and what is shown is their median and the middle half.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bench:
    """What a part is to run with."""

    folder: Path
    """Where packs are written: a directory of its own on the disk to be measured."""
    say: Callable[[str], None]
    """Shows what is being done."""
    rounds: int = 9
    seconds: float = 12.0
    """For what is watched over a time."""
    pack_bytes: int = 1 << 30
    traces: tuple[Path, ...] = ()
    """Routing traces to replay."""
    llama_python: str = ""
    """An interpreter that has llama-cpp-python and gguf; without one llama.cpp is left out."""
    llama_server: str = ""
    """llama.cpp's own server; without it that program is left out."""
    ik_bench: str = ""
    """ik_llama.cpp's llama-batched-bench; without it that program is left out."""
    quick: bool = False
    """Everything once and small: to see it work, not to be quoted."""


@dataclass(frozen=True)
class Figure:
    """One row: ``ours`` beside ``limit``, both in ``unit``, and their ratio with its quartiles."""

    part: str
    what: str
    unit: str
    ours: float
    limit: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    goal: str = ""
    """What is to be reached, such as ``ratio >= 0.9``; empty if the row only informs."""
    met: bool | None = None


def compared(
    part: str,
    what: str,
    unit: str,
    turns: Sequence[tuple[float, float]],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """A figure from (ours, limit) of each turn; the bounds are the ratio's."""
    ratios = [ours / limit for ours, limit in turns]
    ratio = statistics.median(ratios)
    low, high = quartiles(ratios)
    goal, met = _judge("ratio", ratio, at_least, at_most)
    ours, limit = (statistics.median(values) for values in zip(*turns, strict=True))
    return Figure(part, what, unit, ours, limit, ratio, low, high, goal, met)


def counted(
    part: str,
    what: str,
    unit: str,
    values: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """A figure that stands for itself; the bounds are its own, and so are the quartiles."""
    ours = statistics.median(values)
    low, high = quartiles(values)
    goal, met = _judge(unit, ours, at_least, at_most)
    return Figure(part, what, unit, ours, low=low, high=high, goal=goal, met=met)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """What the middle half of ``values`` lies between."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def timed(action: Callable[[], object], calls: int = 1) -> float:
    """Seconds that one of ``calls`` takes."""
    started = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - started) / calls


def _judge(
    name: str, value: float, at_least: float | None, at_most: float | None
) -> tuple[str, bool | None]:
    if at_least is not None and at_most is not None:
        return f"{name} {at_least:g} to {at_most:g}", at_least <= value <= at_most
    if at_least is not None:
        return f"{name} >= {at_least:g}", value >= at_least
    if at_most is not None:
        return f"{name} <= {at_most:g}", value <= at_most
    return "", None

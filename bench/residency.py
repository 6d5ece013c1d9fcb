"""Part 1: hit rates of the daemon's policy on routing traces, by ``expertd replay``."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Bench, Figure
from expertd.traces.replay import HitRates

SHARES = (0.10, 0.25, 0.5)
"""Of all experts, that the figures are about."""


@dataclass(frozen=True)
class Replayed:
    """Hit rates on one trace, by share and by policy; ``optimum`` is one of these."""

    default: str
    """The policy that a daemon has unless told otherwise."""
    rates: dict[float, dict[str, HitRates]]


def measure(bench: Bench) -> Iterator[Figure]:
    """Decode hit rates beside global LRU, and in the unit's words beside the offline optimum."""
    for trace in bench.traces:
        bench.say(f"residency: replaying {trace.name}")
        yield from figures(trace.stem, replayed(trace, SHARES if bench.rounds > 1 else SHARES[:1]))


def replayed(trace: Path, shares: Sequence[float]) -> Replayed:
    """What ``expertd replay`` says of all of the daemon's policies."""
    command = [sys.executable, "-m", "expertd", "replay", str(trace), "--json"]
    command += ["--share", ",".join(map(str, shares))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    rates: dict[float, dict[str, HitRates]] = {}
    default = ""
    for row in json.loads(done.stdout)["results"]:
        found = HitRates(row["decode_hit_rate"], row["lifetime_hit_rate"])
        rates.setdefault(row["share"], {})[row["policy"]] = found
        default = row["policy"] if row["default"] else default
    return Replayed(default, rates)


def figures(name: str, result: Replayed) -> Iterator[Figure]:
    """Of trace ``name``: the default policy's decode hit rates at :data:`SHARES`."""
    for share in SHARES:
        if share not in result.rates:
            continue
        percent = {who: 100 * (each.decode or 0.0) for who, each in result.rates[share].items()}
        ours, lru = percent[result.default], percent["lru"]
        least = -0.5
        if share == SHARES[0]:  # as asked for, of these two models' traces
            least = {"qwen3-30b-a3b": 6.0, "gpt-oss-120b": 3.0}.get(name, least)
        yield Figure(
            "residency",
            f"{name}, {share:.0%} in RAM: {result.default} / lru "
            f"(optimum {percent['optimum']:.1f})",
            "% decode hits",
            ours,
            lru,
            ours / lru,
            goal=f"{least:+g} points",
            met=ours - lru >= least,
        )

"""Part 1: hit rates of the daemon's policy on routing traces, by ``expertd replay``."""

import json
import subprocess
import sys
from collections.abc import Iterator

from bench.figures import Bench, Figure

_SHARES = (0.10, 0.25, 0.5)


def measure(bench: Bench) -> Iterator[Figure]:
    """Decode hit rates beside global LRU, and in the unit's words beside the offline optimum."""
    for trace in bench.traces:
        bench.say(f"residency: replaying {trace.name}")
        shares = ",".join(map(str, _SHARES if bench.rounds > 1 else _SHARES[:1]))
        command = [sys.executable, "-m", "expertd", "replay", str(trace), "--json"]
        done = subprocess.run([*command, "--share", shares], stdout=subprocess.PIPE, check=True)
        rates: dict[float, dict[str, float]] = {}
        default = ""
        for row in json.loads(done.stdout)["results"]:
            rates.setdefault(row["share"], {})[row["policy"]] = 100 * row["decode_hit_rate"]
            default = row["policy"] if row["default"] else default
        for share, by_policy in rates.items():
            ours, lru = by_policy[default], by_policy["lru"]
            least = -0.5
            if share == _SHARES[0]:  # as asked for, of these two models' traces
                least = {"qwen3-30b-a3b": 6.0, "gpt-oss-120b": 3.0}.get(trace.stem, least)
            yield Figure(
                "residency",
                f"{trace.stem}, {share:.0%} in RAM: {default} / lru "
                f"(optimum {by_policy['optimum']:.1f})",
                "% decode hits",
                ours,
                lru,
                ours / lru,
                goal=f"{least:+g} points",
                met=ours - lru >= least,
            )

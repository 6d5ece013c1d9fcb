"""What an honest worker's fetches cost while another process does its worst to the daemon.

``python -m bench.hostile`` prints a line for each attack, ``--json`` one object; name some to
have only those. Before and during are measured in the same seconds on one machine, whose cores the
attacker also takes: the ratio is what to read.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertd_testing.attacks import ATTACKS
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertd_testing.honest import RECORD_BYTES, measure, quantile

BEFORE_SECONDS, SECONDS = 2.0, 4.0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attacks", nargs="*", choices=[[], *ATTACKS], metavar="ATTACK")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as directory:
        pack = make_pack(Path(directory) / "pack")
        for name in arguments.attacks or ATTACKS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = under(name, pack)
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


def under(name: str, pack: Path) -> dict[str, Any]:
    """One attack on a daemon of its own, with room for half of the model."""
    with serving({"m": pack}, ram=12 * RECORD_BYTES) as daemon:
        result = measure(name, daemon, BEFORE_SECONDS, SECONDS)
    figures: dict[str, Any] = {
        f"{when}_{label}_ms": round(quantile(times, share) * 1e3, 2)
        for when, times in (("before", result.before), ("during", result.during))
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {**figures, "rss_growth_bytes": result.growth_bytes, "told": result.said}


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table."""
    table = Table(title="Fetch of an honest worker, ms")
    for column in ("attack", "p50 before", "p50", "p99 before", "p99", "RSS", "answers"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for name, row in results.items():
        table.add_row(
            name,
            *(f"{row[key]:.1f}" for key in ("before_p50_ms", "during_p50_ms")),
            *(f"{row[key]:.1f}" for key in ("before_p99_ms", "during_p99_ms")),
            f"{row['rss_growth_bytes'] / 2**20:+.0f} MiB",
            ", ".join(f"{count} {what}" for what, count in row["told"].items()),
        )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()

"""What the store costs on this host, beside its limits: ``make bench-store``.

Every limit is measured in the same seconds as ours, in turns: machines differ and drift, so the
ratios are what to read. It takes about five minutes; run it on an idle machine, and with --dir
on the disk that matters. docs/store-speed.md tells how to read it.

Example: python -m bench.store --only cold --only calls --dir /var/lib/expertd --json
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.figures import Bench, Figure
from bench.progress import progress

PARTS = ("residency", "cold", "hints", "hits", "calls", "restart")
QUICK = {"rounds": 1, "seconds": 0.3, "pack_bytes": 4 << 20, "quick": True}
_FILE_COLUMNS = 150
_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.store",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated")
    parser.add_argument("--dir", type=Path, help="where to write packs; default: $TMPDIR or /tmp")
    parser.add_argument("--trace", type=Path, action="append", help="a routing trace to replay")
    parser.add_argument("--quick", action="store_true", help="everything once, to see it work")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as folder,
        progress(console, "starting") as status,
    ):
        for part in options.only or PARTS:
            # Short: a Unix socket's path may have 107 bytes at most.
            place = Path(folder) / part
            place.mkdir()
            bench = Bench(
                place,
                status.update,
                traces=tuple(options.trace or default_traces()),
                **(QUICK if options.quick else {}),
            )
            figures += run(part, bench, console)
    load = os.getloadavg()[0]
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "load_average": load}, indent=1))
    else:
        show(figures)
        print(f"load average {load:.1f} on {os.cpu_count()} CPUs")


def run(part: str, bench: Bench, console: Console) -> list[Figure]:
    """The figures of one part; none, with a word why, if it is not there."""
    try:
        module = importlib.import_module(f"bench.{part}")
    except ModuleNotFoundError as error:
        if error.name != f"bench.{part}":
            raise
        console.print(f"{part}: there is no bench/{part}.py")
        return []
    figures = []
    for figure in module.measure(bench):
        figures.append(figure)
        console.print(f"  {figure.what}: {_shown(figure)}", highlight=False)
    return figures


def default_traces() -> list[Path]:
    """Those that lie beside the repository, or the example model's."""
    beside = sorted((_ROOT.parent / "shared" / "traces").glob("*.csv"))
    return beside or sorted((_ROOT / "examples").glob("*/*.csv"))


def show(figures: Sequence[Figure], title: str = "the store on this host") -> None:
    """As a table."""
    table = Table(title=title, title_justify="left")
    for column in ("part", "what", "ours", "its limit", "ratio (middle half)", "goal", ""):
        table.add_column(column)
    for figure in figures:
        table.add_row(
            figure.part,
            figure.what,
            f"{figure.ours:.3g} {figure.unit}",
            "" if figure.limit is None else f"{figure.limit:.3g} {figure.unit}",
            _shown(figure),
            figure.goal,
            {True: "met", False: "missed", None: ""}[figure.met],
        )
    Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS).print(table)


def _shown(figure: Figure) -> str:
    """The ratio, or what stands for itself, with its spread."""
    value = figure.ours if figure.ratio is None else figure.ratio
    spread = ""
    if figure.low is not None and figure.high is not None:
        spread = f" ({figure.low:.2f} to {figure.high:.2f})"
    return f"{value:.2f}{spread}"


if __name__ == "__main__":
    main()

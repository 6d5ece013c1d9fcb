"""Measures everything that docs/benchmarks.md shows, and writes that page: ``make bench``.

Each part runs in a process of its own and leaves docs/benchmarks/PART.json, with the host's
description; the page and its plots are made of these files alone. Run it on an idle machine; a
part alone by its name. What a quick run measures is for seeing it work: it goes to --out and
never into docs.

Example: python -m bench sharing spill --dir /var/lib/expertd
         python -m bench --quick --out /tmp/bench
         python -m bench peers --llama-python ~/llama/bin/python
         python -m bench --page
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.figures import Bench, Figure
from bench.page import write_page
from bench.parts import PARTS
from bench.progress import progress
from bench.results import new_result, write_result
from bench.store import QUICK, default_traces, show

_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, writes the page; 1 if a part failed."""
    options = _parser().parse_args(arguments)
    if unknown := [name for name in options.part if name not in PARTS]:
        sys.exit(f"There is no part {unknown[0]!r}: there are {', '.join(PARTS)}.")
    if options.quick and options.out is None:
        sys.exit("A quick run's figures are not for docs: name a folder for them with --out.")
    out: Path = options.out or _ROOT / "docs"
    parts = options.part or list(PARTS)
    if options.here:
        _measure(parts[0], options, out)
        return 0
    failed = []
    if not options.page:
        console = Console(stderr=True)
        for number, name in enumerate(parts, 1):
            part = PARTS[name]
            minutes = "" if options.quick else f", about {part.minutes:g} min"
            console.rule(f"{number} of {len(parts)}: {name}{minutes}", align="left")
            if _in_a_process(name, options, out):
                failed.append(name)
    page = write_page(out)
    if options.json:
        results = [
            json.loads((out / "benchmarks" / f"{name}.json").read_text())
            for name in parts
            if name not in failed and (out / "benchmarks" / f"{name}.json").exists()
        ]
        print(json.dumps({"results": results, "failed": failed}, indent=1))
    print(f"written to {page}", file=sys.stderr)
    if failed:
        print(
            f"failed, so what the page says of it is older, or nothing: {', '.join(failed)}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    names = "\n".join(
        f"  {part.name:<10} {part.title} ({part.minutes:g} min)" for part in PARTS.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{description}\n\nParts:\n{names}",
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="*", help="default: all")
    parser.add_argument("--quick", action="store_true", help="small and once, to see it work")
    parser.add_argument("--out", type=Path, help="for benchmarks.md and its folder; default: docs")
    parser.add_argument("--dir", type=Path, help="where to write packs; default: $TMPDIR or /tmp")
    parser.add_argument(
        "--llama-python",
        metavar="PYTHON",
        default="",
        help="an interpreter that has llama-cpp-python and gguf, for llama.cpp beside ours",
    )
    parser.add_argument(
        "--llama-server", metavar="PROGRAM", default="", help="llama-server, for it beside ours"
    )
    parser.add_argument(
        "--ik-bench",
        metavar="PROGRAM",
        default="",
        help="llama-batched-bench of ik_llama.cpp, for it beside ours",
    )
    parser.add_argument("--page", action="store_true", help="write the page again, measure nothing")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    # One part, in this process: what the others are started with.
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def _in_a_process(name: str, options: argparse.Namespace, out: Path) -> int:
    command = [sys.executable, "-m", "bench", name, "--here", "--out", str(out)]
    if options.quick:
        command.append("--quick")
    if options.dir:
        command += ["--dir", str(options.dir)]
    if options.llama_python:
        command += ["--llama-python", options.llama_python]
    if options.llama_server:
        command += ["--llama-server", options.llama_server]
    if options.ik_bench:
        command += ["--ik-bench", options.ik_bench]
    # Threads of torch that spin while they wait would take the cores from a worker's; and it is set
    # before anything imports torch. Other programs have an environment of their own (bench.peer).
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=_ROOT, check=False, env=environment).returncode


def _measure(name: str, options: argparse.Namespace, out: Path) -> None:
    console = Console(stderr=True)
    command = f"python -m bench {name}" + (" --quick" if options.quick else "")
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as folder,
        progress(console, name) as status,
        new_result(name, command, quick=options.quick) as result,
    ):
        bench = Bench(
            Path(folder),
            status.update,
            traces=tuple(default_traces()),
            llama_python=options.llama_python,
            llama_server=options.llama_server,
            ik_bench=options.ik_bench,
            **(QUICK if options.quick else {}),
        )
        for what in PARTS[name].run(bench):
            result.add(what)
            if isinstance(what, str):
                console.print(f"  not measured: {what}", highlight=False)
            elif isinstance(what, Figure):
                console.print(f"  {what.what}: {what.ours:.3g} {what.unit}", highlight=False)
    write_result(result, out / "benchmarks")
    show(result.figures, PARTS[name].title)


if __name__ == "__main__":
    sys.exit(main())

"""What a GPU host makes of expertd: ``make gpu-bench``. Under ten minutes, without a network.

Packs of real models' shapes are made on the spot, a daemon loads them, and a worker on the first
GPU is measured: copies beside a plain pinned copy, the paper's ablation beside its bound, the
kernels beside the GPU's memory (bench.gpu_kernels). Results are written as they come, to DIR as
JSON and as a page, with the host's description. A part that fails or finds no time left says so,
and the others go on.

Example: python -m bench.gpu --shape qwen3-30b-a3b --trace ../shared/traces/qwen3-30b-a3b.csv
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

if "--fake" in sys.argv:
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from bench import gpu_copies, gpu_decode
from bench.gpu_figures import GpuFigure
from bench.gpu_rig import OutOfTimeError, Rig, loaded
from bench.host import describe_host
from bench.store import default_traces

SHAPES = ("qwen3-30b-a3b", "mixtral-8x7b")
SCHEME = "4bit"
KERNELS_SECONDS = 150
"""Kept for the kernels, which need most of it to compile."""
_ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object too")
    parser.add_argument("--seconds", type=float, default=540, help="in all; default: 540")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--scheme", default=SCHEME, help="the packs' scheme; default: 4bit")
    parser.add_argument("--trace", type=Path, action="append", help="routing to replay")
    parser.add_argument("--dir", type=Path, help="where to write packs (10 GB); default: /dev/shm")
    parser.add_argument(
        "--out", type=Path, default=_ROOT / "docs/benchmarks", help="default: docs/benchmarks"
    )
    parser.add_argument("--fake", action="store_true", help="tiny, on the fake device: does it run")
    options = parser.parse_args(arguments)
    if not options.fake and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --fake shows that the bench itself works")
    begin = time.monotonic()
    report = Report(options.out, fake=options.fake)
    shapes = options.shape or list(SHAPES)
    shared = Path("/dev/shm")
    folder = options.dir or (shared if shared.is_dir() and not options.fake else None)
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=folder) as place:
        rig = Rig(
            Path(place),
            say,
            begin + options.seconds - KERNELS_SECONDS,
            options.fake,
            tuple(options.trace or default_traces()),
        )
        for number, shape in enumerate(shapes, 1):
            share = number / len(shapes) * (options.seconds - KERNELS_SECONDS)
            report.take(shape, _shape(replace(rig, deadline=begin + share), shape, options.scheme))
    report.take("kernels", _kernels(begin + options.seconds, fake=options.fake))
    if options.json:
        print(json.dumps(report.content(), indent=1))
    say(f"written to {report.path} and {report.path.with_suffix('.md')}")


def say(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


class Report:
    """The figures so far; written after each."""

    def __init__(self, folder: Path, *, fake: bool) -> None:
        self.host = describe_host()
        self.figures: list[GpuFigure] = []
        self.failures: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        gpu = "fake" if fake else torch.cuda.get_device_name(0)
        name = "".join(each if each.isalnum() else "-" for each in gpu.lower())
        self.path = folder / f"gpu-{name}.json"

    def take(self, part: str, figures: Iterator[GpuFigure]) -> None:
        """All of a part that come; whatever goes wrong is noted."""
        try:
            for figure in figures:
                self.figures.append(figure)
                self.write()
                value = figure.ours if figure.ratio is None else figure.ratio
                state = " ".join(filter(None, (figure.arena, figure.steps)))
                say(f"  {figure.what} [{state}]: {figure.ours:.3g} {figure.unit} ({value:.2f})")
        except OutOfTimeError as error:
            self.failures.append(f"{part}: cut short, {error}")
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).splitlines() or [""])[0]
            self.failures.append(f"{part}: {type(error).__name__}: {reason}")
        self.write()

    def content(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "host": self.host,
            "figures": [asdict(figure) for figure in self.figures],
            "failures": self.failures,
        }

    def write(self) -> None:
        """Both files, whole."""
        for path, text in (
            (self.path, json.dumps(self.content(), indent=1) + "\n"),
            (self.path.with_suffix(".md"), self._page()),
        ):
            partial = path.with_suffix(".part")
            partial.write_text(text)
            partial.rename(path)

    def _page(self) -> str:
        lines = [f"# {self.host.get('GPU', 'The fake device')}", "", "`make gpu-bench` on:", ""]
        lines += [f"- {name}: {value}" for name, value in self.host.items()]
        lines += ["", "| what | arena | steps | ours | limit | bound by | ratio | goal | |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for each in self.figures:
            limit = "" if each.limit is None else f"{each.limit:.4g} {each.unit}"
            ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
            met = {True: "met", False: "missed", None: ""}[each.met]
            ours = f"{each.ours:.4g} {each.unit}"
            cells = [each.what, each.arena, each.steps, ours, limit, each.bound, ratio, each.goal]
            lines.append(f"| {' | '.join([*cells, met])} |")
        if self.failures:
            lines += ["", "Not measured:", "", *(f"- {failure}" for failure in self.failures)]
        return "\n".join([*lines, ""])


def _shape(rig: Rig, shape: str, scheme: str) -> Iterator[GpuFigure]:
    pack = rig.make_pack(shape, scheme)
    try:
        with loaded(rig, pack) as (_, session):
            yield from gpu_copies.measure(rig, shape, session)
            yield from gpu_decode.measure(rig, shape, pack, session)
    finally:
        for file in pack.iterdir():
            file.unlink()


def _kernels(deadline: float, *, fake: bool) -> Iterator[GpuFigure]:
    """By a process of its own, whose compiling may be cut short."""
    if fake:
        return
    left = deadline - time.monotonic()
    if left < 30:
        raise OutOfTimeError(f"{left:.0f} s are left")
    command = [sys.executable, "-m", "bench.gpu_kernels", "--json", "--scheme", "4g64"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=left, check=True, cwd=_ROOT
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfTimeError("compiling and measuring them took longer than was left") from error
    for row in json.loads(done.stdout)["figures"]:
        yield GpuFigure(**row)


if __name__ == "__main__":
    main()

"""The parts of ``make bench``, in the order in which they run and are shown."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Bench, Figure
from bench.results import Plot, Table

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A module with ``measure(bench)``, or one that runs by itself and prints ``--json``."""

    name: str
    title: str
    module: str
    minutes: float
    """What it takes on two cores, about."""
    arguments: tuple[str, ...] | None = None
    """Of a module that runs by itself; None for one with ``measure``."""
    quick: tuple[str, ...] = ()
    """Further arguments for the quick run."""

    def run(self, bench: Bench) -> Iterator[Figure | Table | Plot | str]:
        """What it measures, as it comes; strings tell what could not be measured."""
        if self.arguments is None:
            yield from importlib.import_module(self.module).measure(bench)
            return
        bench.say(f"{self.name}: python -m {self.module}")
        command = [sys.executable, "-m", self.module, *self.arguments, "--json"]
        if bench.quick:
            command += self.quick
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=_ROOT)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        for row in json.loads(done.stdout)["figures"]:
            yield Figure(**row)

    def text(self) -> str:
        """What the module says of itself, without its example."""
        module = importlib.import_module(self.module)
        return (module.__doc__ or "").partition("\n\nExample:")[0].strip()


PARTS = {
    part.name: part
    for part in (
        Part(
            "kernels",
            "Kernels on the CPU, beside memory's speed",
            "bench.kernels",
            1,
            ("--part", "experts"),
            ("--shape", "qwen3-30b-a3b", "--rounds", "1", "--bytes", str(64 << 20)),
        ),
        Part("quality", "Quality and size (the paper's Table 1)", "bench.quality", 7),
        Part("routing", "Caches and guesses (the paper's Figure 2)", "bench.routing", 2),
        Part(
            "ablation", "The paper's ablation (its Table 2), from disk to RAM", "bench.ablation", 3
        ),
        Part(
            "advise", "What expert-run advise predicts, beside what is measured", "bench.advise", 3
        ),
        Part("spill", "More model than RAM", "bench.spill", 6),
        Part("tables", "Tables of rows", "bench.tables", 6),
        Part("sharing", "One copy for many workers", "bench.sharing", 5),
        Part("batch", "Many sequences at once, beside other engines", "bench.batch", 20),
        Part("serve", "A server with many clients, beside llama-server", "bench.serve", 25),
        Part("executors", "What each executor makes of several sequences", "bench.executors", 7),
        Part("peers", "Other programs beside ours", "bench.contest", 5),
    )
}

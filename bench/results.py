"""What a part of ``make bench`` leaves in docs/benchmarks: everything that is shown of it."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.figures import Figure
from bench.host import describe_host

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``columns``, written as they are; ``note`` stands below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Points of a plot, by x; ``low`` and ``high`` are their spread, if there is one."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False
    """A limit or someone else's, not ours."""


@dataclass(frozen=True)
class Plot:
    """Curves over one axis, or bars: then ``ticks`` names the places 0, 1, 2 ... of x."""

    name: str
    """Of its file: letters, digits and hyphens."""
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    ticks: tuple[str, ...] = ()
    x_log: bool = False
    y_log: bool = False


@dataclass
class Result:
    """One run of a part; what was not measured, such as a missing peer, is in ``missing``."""

    part: str
    host: dict[str, str]
    commit: str
    """The source that was measured, by its Git commit; with a plus if it was changed since."""
    date: str
    command: str
    quick: bool = False
    seconds: float = 0.0
    load: float = 0.0
    """The host's load average before it began: above 0.5, others were at work."""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, what: "Figure | Table | Plot | str") -> None:
        """A figure, a table, a plot; or, as a string, what was not measured and why."""
        match what:
            case Figure():
                self.figures.append(what)
            case Table():
                self.tables.append(what)
            case Plot():
                self.plots.append(what)
            case str():
                self.missing.append(what)


@contextmanager
def new_result(part: str, command: str, *, quick: bool) -> Iterator[Result]:
    """To be filled in the block; its time is taken."""
    result = Result(
        part, describe_host(), _commit(), time.strftime("%Y-%m-%d"), command, quick=quick
    )
    result.load = round(os.getloadavg()[0], 2)
    began = time.monotonic()
    yield result
    result.seconds = round(time.monotonic() - began, 1)


def write_result(result: Result, folder: Path) -> Path:
    """As ``PART.json`` in ``folder``: whole, or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.part}.json"
    partial = path.with_suffix(".part")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    partial.rename(path)
    return path


def read_result(path: Path) -> Result:
    """What :func:`write_result` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":!docs/benchmarks", ":!docs/benchmarks.md")
        return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

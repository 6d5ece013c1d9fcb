"""An honest worker's fetches, timed while somebody attacks."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expertd_testing.daemon import Daemon
from expertd_testing.handmade import PAGE, record
from expertd_testing.raw_worker import RawWorker
from expertd_testing.watching import rss_bytes

ROOT = Path(__file__).parents[3]
RECORD_BYTES = 2 * PAGE
_SECONDS = 30.0


def fetch_seconds(worker: RawWorker, seconds: float) -> list[float]:
    """How long each fetch took, for that long; every record is looked at."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        index = len(found)
        layer, expert = index % 3, index % 8
        began = time.perf_counter()
        worker.fetch(layer, [expert], seconds=_SECONDS)
        found.append(time.perf_counter() - began)
        assert worker.read(layer, expert, RECORD_BYTES) == record(layer, expert)
        worker.let_go()
        assert not worker.page.revoked
    return sorted(found)


def quantile(times: list[float], share: float) -> float:
    """Of sorted times."""
    return times[min(len(times) - 1, int(share * len(times)))]


@dataclass(frozen=True)
class Result:
    """Sorted times of the honest worker's fetches, and what the attack did besides."""

    before: list[float]
    during: list[float]
    growth_bytes: int
    """Of the daemon's RSS, at the attack's end."""
    said: dict[str, int]
    """What the attacker was told, and how often."""


def measure(name: str, daemon: Daemon, before_seconds: float, seconds: float) -> Result:
    """An attack on ``daemon``, which has model ``m`` and room for half of it."""
    said: dict[str, int] = {}
    with RawWorker(daemon.socket) as worker:
        before = fetch_seconds(worker, before_seconds)
        rss = rss_bytes(daemon.pid)
        with attacked(name, daemon.socket, said):
            during = fetch_seconds(worker, seconds)
            growth = rss_bytes(daemon.pid) - rss
    return Result(before, during, growth, said)


@contextmanager
def attacked(name: str, socket: Path, said: dict[str, int]) -> Iterator[None]:
    """While the block runs, that attack goes on; ``said`` is filled with what came of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "expertd_testing.attacks", name, str(socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == "attacking\n", first or process.communicate(timeout=30)
            yield
            out, err = process.communicate("", timeout=60)
            assert (process.returncode, err) == (0, "")
            said.update(ast.literal_eval(out))
        finally:
            process.kill()

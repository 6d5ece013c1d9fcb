"""What tests wait for and measure of a daemon."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from expertd_client import Client
from expertd_testing.handmade import record
from expertd_testing.patience import HANG_SECONDS

ROOT = Path(__file__).parents[3]


def eventually(condition: Callable[[], bool], seconds: float = HANG_SECONDS) -> float:
    """Waits for it; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.002)
    return time.monotonic() - began


def assert_serves(directory: Path, model: str = "m", experts: int = 8, seed: int = 0) -> None:
    """Another worker gets right bytes."""
    with Client(directory, timeout_seconds=10) as store, store.attach(model) as session:
        size = session.model.record_bytes
        for lease in session.waves(1, range(experts)):
            with lease:
                for expert, view in zip(lease.experts, lease.views, strict=True):
                    assert bytes(view) == record(1, expert, size, seed)


def num_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def expertd(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """The command, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "expertd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )


def python(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that runs ``script`` and may import the tests."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )

"""The tests that need a GPU, in several processes: ``make gpu-test``.

``tests/gpu.ini`` names their files; what a CPU can show is CI's. Most of the time goes into
compiling kernels, which processes do side by side: by pytest-xdist where the host has it, or else
by as many pytests of our own, each with a share of the tests. Kernels that one has compiled, the
others find on disk. Exit code: the highest of theirs.

Example: python -m tests.on_gpu -k gather
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROCESSES = 10
ROOT = Path(__file__).resolve().parent.parent
_PYTEST = [sys.executable, "-m", "pytest", "-c", "tests/gpu.ini", "--rootdir", "."]
_NOTHING_COLLECTED = 5


def main(arguments: Sequence[str]) -> int:
    """Runs them; ``arguments`` are pytest's."""
    processes = max(1, min(PROCESSES, os.cpu_count() or 1))
    if "--collect-only" in arguments or processes == 1:
        return _run([*_PYTEST, *arguments])
    if importlib.util.find_spec("xdist") is not None:
        return _run([*_PYTEST, "-n", str(processes), *arguments])
    return _in_shares(processes, arguments)


def _in_shares(processes: int, arguments: Sequence[str]) -> int:
    listed = subprocess.run(
        [*_PYTEST, "--collect-only", "-q", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = listed.stdout.splitlines()
    tests = [line for line in lines if line.startswith("tests/") and "::" in line]
    if listed.returncode or not tests:
        sys.stdout.write(listed.stdout)
        return listed.returncode or _NOTHING_COLLECTED
    started = [
        subprocess.Popen([*_PYTEST, "-q", *tests[number::processes]], cwd=ROOT)
        for number in range(min(processes, len(tests)))
    ]
    return max(process.wait() for process in started)


def _run(command: Sequence[str]) -> int:
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

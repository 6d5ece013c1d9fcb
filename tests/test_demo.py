"""The demo, as `make demo` runs it, with fewer tokens and without the quantizer's half minute."""

import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples/demo.py"


def test_demo_shows_two_texts_and_the_table() -> None:
    done = subprocess.run(
        [sys.executable, DEMO],
        env=os.environ | {"DEMO_TOKENS": "24", "DEMO_SCHEME": "bf16"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "worker 1 |" in done.stdout
    assert "worker 2 |" in done.stdout
    table = done.stdout[done.stdout.index("One copy, two workers") :]
    assert "24 of 48 experts in RAM" in table
    shared = next(line for line in table.splitlines() if "shared copy" in line)
    hits, reads = (int(cell.split()[0]) for cell in shared.split("│")[3:5])
    assert hits > 0
    assert reads > 0, "half of the experts were on disk, so some had to be read"
    assert "expertd stopped with exit code 0" in done.stdout

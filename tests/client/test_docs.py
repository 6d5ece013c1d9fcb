"""The examples of docs/client.md run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

from expertd_testing.daemon import serving
from tests.client.conftest import RECORD_BYTES

PAGE = Path(__file__).parents[2] / "docs" / "client.md"


def test_examples_run(pack: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    with serving({"mixtral": pack}, ram=7 * RECORD_BYTES) as daemon:
        script = "\n".join(blocks).replace("/run/expertd", str(daemon.socket))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "0 (0, 1, 2, 3, 4, 5, 6)\n0 (7,)\n" in done.stdout

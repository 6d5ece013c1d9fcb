"""Prometheus' own checker, where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: apt-get install prometheus)",
)


def check(*arguments: object, text: str = "", directory: Path | None = None) -> str:
    """What ``promtool`` says to ``text``; fails the test if it does not agree."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=directory,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said

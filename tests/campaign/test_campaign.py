"""The kill campaign as CI runs it; ``make soak`` runs it for longer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKER_KILLS, DAEMON_KILLS = 100, 10  # with cold restarts, and as many with warm ones
SECONDS = 900  # several times what it takes on two busy cores

COMMAND = [sys.executable, "-m", "tests.campaign"]
# Serves other packs than the workers expect, with checksums that are right.
OTHER_PACKS = """
import sys
from tests.campaign import models

right = models.make_pack
models.make_pack = lambda path, **spec: right(path, **{**spec, "seed": spec["seed"] + 10})
from tests.campaign.__main__ import main
sys.exit(main())
"""


def run(*command: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and log of a campaign."""
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # it takes its daemon and its workers along
            out, err = process.communicate(timeout=60)
            raise AssertionError(f"the campaign hangs:\n{err}") from None
    assert out, err
    return process.returncode, json.loads(out), err


@pytest.mark.parametrize("restarts", ["cold", "warm"])
def test_workers_and_daemons_killed_at_random(restarts: str) -> None:
    code, report, err = run(
        *(*COMMAND, "--worker-kills", WORKER_KILLS, "--daemon-kills", DAEMON_KILLS),
        *("--restarts", restarts, "--json"),
    )
    assert report["problems"] == [], err
    assert code == 0
    assert report["worker_kills"] >= WORKER_KILLS
    assert report["daemon_kills"] >= DAEMON_KILLS
    work = report["work"]
    assert work["records_wrong"] == 0
    assert work["records_used"] > 10 * WORKER_KILLS
    assert min(work["hits"], work["misses"], work["reads"], report["worker_stops"]) > 0
    # Each worker attached, most of those that lived through a daemon's end once more.
    assert work["attaches"] > WORKER_KILLS


def test_a_wrong_byte_is_found() -> None:
    """The campaign itself is not blind."""
    code, report, err = run(
        sys.executable, "-c", OTHER_PACKS, "--worker-kills", 1, "--daemon-kills", 1, "--json"
    )
    assert code == 1
    assert report["passed"] is False
    # None is killed in the first round, and each that is told to stop has looked at a record.
    assert report["work"]["records_wrong"] > 0, err
    assert any("WrongBytesError: " in problem for problem in report["problems"])
    assert not any("the sessions are not" in problem for problem in report["problems"])

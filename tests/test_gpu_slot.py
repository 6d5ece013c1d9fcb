"""``make gpu-slot`` keeps its limits and loses nothing; on the fake device all of it runs."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

from bench import gpu_needs, gpu_slot
from bench.gpu_rows import SOME_FAILED, Rows, read_rows
from bench.gpu_slot import STAGES, Slot, Stage
from bench.gpu_summary import summary

ROOT = Path(__file__).parent.parent
MOST_FILES = 8


@pytest.mark.bench
def test_every_stage_runs_on_the_fake_device(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_slot", "--fake", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-3000:]
    rows = read_rows(tmp_path)
    by_stage = {stage.name: [row for row in rows if row["stage"] == stage.name] for stage in STAGES}
    assert all(by_stage.values())
    # What only a GPU can tell says so.
    for name in ("env", "probe", "tests", "kernels", "hmm"):
        assert any(row.get("status") == "skipped" for row in by_stage[name])
    # Every row of a worker says what it ran in.
    ways = [row for row in rows if "tokens_per_s" in row or "same_choice" in row]
    assert {row["arena"] for row in ways} == {"registered"}
    assert {row["steps"] for row in ways} == {"off", "segments", "whole"}
    assert all(row["bound_by"] in {"link", "memory"} for row in ways if "tokens_per_s" in row)
    assert all(row["arena"] in {"registered", "staged"} for row in by_stage["copies"])
    cached = [row for row in ways if row.get("cached") == "all cached"]
    assert cached
    assert all(row["hits"] == 1 and row["MB_a_token"] == 0 for row in cached)
    page = (tmp_path / "summary.md").read_text()
    for stage in STAGES:
        assert f"| {stage.name} | complete" in page
    files = list(tmp_path.iterdir())
    assert len(files) <= MOST_FILES
    assert {file.name for file in files} <= set(gpu_slot.RESULTS)


def test_the_stages_fit_their_time() -> None:
    assert gpu_slot.SECONDS <= 500
    unasked = [stage for stage in STAGES if stage.unasked]
    # The most telling come first, and all of them fit.
    before_last = sum(stage.seconds for stage in unasked if stage.name not in ("copies", "kernels"))
    assert before_last + gpu_slot.END_SECONDS <= gpu_slot.SECONDS


def test_the_docs_have_the_stages() -> None:
    page = (ROOT / "docs/gpu-hosts.md").read_text()
    for stage in STAGES:
        asked = "" if stage.unasked else "if asked for: "
        assert f"| `{stage.name}` | {stage.seconds:.0f} s | {asked}" in page


@pytest.fixture
def slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slot:
    """A run whose stages are shell scripts: what a stage answers is what it does."""
    monkeypatch.setattr(gpu_slot, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(gpu_slot, "FAKE_LIMIT", 3.0)
    options = argparse.Namespace(out=tmp_path / "out", fake=True, seconds=60.0, trace=[])
    (tmp_path / "work").mkdir()
    slot = Slot(options, tmp_path / "work", time.monotonic())
    scripts = {
        "hangs": 'echo \'{"stage": "hangs", "what": "begun", "found": 1}\' >> results.jsonl; '
        "sleep 1000 & echo $! > child; wait",
        "crashes": "exit 9",
        "fails": f"exit {SOME_FAILED}",
        "works": 'echo \'{"stage": "works", "what": "done"}\' >> results.jsonl',
    }

    def command(name: str, seconds: float) -> list[str]:
        return ["bash", "-c", f"cd {options.out}; {scripts[name]}"]

    monkeypatch.setattr(slot, "_command", command)
    return slot


def test_a_stage_that_hangs_is_killed_with_what_it_started(slot: Slot) -> None:
    slot.run(Stage("hangs", 30, ""))
    slot.run(Stage("works", 30, ""))
    rows = read_rows(slot.options.out)
    assert [(row["stage"], row["what"], row.get("status")) for row in rows] == [
        ("hangs", "begun", None),
        ("hangs", "all of it", "failed"),
        ("works", "done", None),
    ]
    assert "killed at its limit of 3 s" in rows[1]["reason"]
    child = int((slot.options.out / "child").read_text())
    assert not _runs(child)
    assert slot.failed
    assert "| hangs | killed" in (slot.options.out / "summary.md").read_text()


@pytest.mark.parametrize(("name", "says"), [("crashes", "with code 9"), ("fails", "with failures")])
def test_a_stage_that_fails_does_not_end_the_others(slot: Slot, name: str, says: str) -> None:
    slot.run(Stage(name, 30, ""))
    assert slot.failed
    slot.run(Stage("works", 30, ""))
    page = (slot.options.out / "summary.md").read_text()
    assert f"| {name} | {says}" in page
    assert "| works | complete" in page


def test_a_stage_without_time_is_not_begun(slot: Slot) -> None:
    slot._end = time.monotonic()
    slot.run(Stage("works", 30, ""))
    (row,) = read_rows(slot.options.out)
    assert (row["what"], row["status"]) == ("all of it", "cut")
    assert not slot.failed


def test_a_summary_says_what_state_a_row_was_in(tmp_path: Path) -> None:
    rows = Rows(tmp_path, "decode")
    with rows.part("whole") as row:
        row.update(arena="staged", steps="segments", tokens_per_s=12.3456)
    with rows.part("broken"):
        raise ValueError("no | such\nthing")
    rows.skipped("graph")
    with rows.path.open("a") as file:
        file.write('{"stage": "decode", "what": "cut in the mid')
    page = summary(read_rows(tmp_path), {"decode": "complete, 3 s"})
    assert "| whole | staged | segments | tokens_per_s 12.35, seconds 0 |" in page
    assert "| broken | - | - | **failed**: ValueError: no / such thing |" in page
    assert "| graph | - | - | **skipped**: only a GPU can tell |" in page
    assert "| decode | complete, 3 s | 3 | 1 |" in page


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_slot.main(["--stages", "probe,mixtal"])
    assert "there is no stage 'mixtal'; there are env, probe" in capsys.readouterr().err


def test_wheels_that_were_brought_are_installed_apart(tmp_path: Path) -> None:
    wheels, site = tmp_path / "whl", tmp_path / "build/site"
    wheels.mkdir()
    gpu_needs.install(wheels, site)
    assert not site.exists()
    _write_wheel(wheels, "brought_along")
    gpu_needs.install(wheels, site)
    installed = site / "brought_along.py"
    assert installed.read_text() == "HERE = True\n"
    installed.unlink()
    gpu_needs.install(wheels, site)
    assert not installed.exists(), "it was installed again though nothing had changed"
    _write_wheel(wheels, "another")
    gpu_needs.install(wheels, site)
    assert installed.exists()
    assert (site / "another.py").exists()
    assert [path.name for path in site.parent.iterdir()] == ["site"]


def _write_wheel(folder: Path, name: str) -> None:
    info = f"{name}-1.0.dist-info"
    with ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "HERE = True\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")


def _runs(pid: int) -> bool:
    """Whether there is such a process that is not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

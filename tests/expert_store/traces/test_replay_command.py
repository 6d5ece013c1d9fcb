"""``expertd replay``: the table, the JSON, and what is said to wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.settings.policy_names import PolicyName
from expertstore.trace import HEADER

HEAD = f"# layers: 2\n# experts_per_layer: 8\n# experts_per_token: 2\n{HEADER}\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertd", "replay", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    rows = ["prefill,0,0,0 1 2 3", "prefill,0,1,4 5 6 7"]
    for step in range(1, 30):
        rows += [f"decode,{step},0,0 {1 + step % 5}", f"decode,{step},1,4 {step % 3}"]
    path.write_text(HEAD + "\n".join(rows) + "\n")
    return path


def test_json_has_each_policy_and_the_optimum_per_share(trace: Path) -> None:
    done = run(trace, "--share", "0.3,1", "--json")
    assert not done.stderr
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert list(report) == ["results"]
    names = [*PolicyName, "optimum"]
    assert [row["policy"] for row in report["results"]] == names * 2
    assert [row["share"] for row in report["results"]] == [0.3] * len(names) + [1.0] * len(names)
    assert {row["policy"] for row in report["results"] if row["default"]} == {"density"}
    for row in report["results"]:
        assert list(row) == [
            "policy", "share", "decode_hit_rate", "lifetime_hit_rate", "default",
        ]  # fmt: skip
        assert 0 <= row["lifetime_hit_rate"] <= 1
    assert len({row["decode_hit_rate"] for row in report["results"] if row["share"] == 1}) == 1


def test_the_table_shows_the_same(trace: Path) -> None:
    done = run(trace, "--share", "0.5", "--policy", "lru", "--policy", "density")
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert lines[0] == ["share", "policy", "decode", "lifetime"]
    assert [line[1] for line in lines[1:]] == ["lru", "density", "optimum"]
    assert lines[2][-1] == "default"


def test_a_share_below_the_working_set_is_told(trace: Path) -> None:
    done = run(trace, "--share", "0.2", "--policy", "lru")
    assert "one token uses 4 of 16 experts" in done.stderr
    assert done.returncode == 0


def test_workers_share_the_store(trace: Path) -> None:
    alone, three = run(trace, "--json"), run(trace, "--json", "--workers", "3")
    assert three.returncode == 0
    assert json.loads(alone.stdout) != json.loads(three.stdout)


def test_missing_accesses_are_told(trace: Path) -> None:
    trace.write_text(trace.read_text() + "# gap: 1 70\n")
    assert "70 accesses are missing" in run(trace).stderr


def test_a_policy_of_ones_own(trace: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from expertd.residency.lru import Lru\n\n"
        "class Mine(Lru):\n    name = 'mine'\n    def of(self, entries): return -entries + 100.0\n"
    )
    done = run(trace, "--policy", f"{own}:Mine", "--json")
    assert [row["policy"] for row in json.loads(done.stdout)["results"]] == ["mine", "optimum"] * 3
    done = run(trace, "--policy", f"{own}:Other")
    assert done.stderr == (
        f"expertd: {own} has no class 'Other' derived from expertd.residency.Policy.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--share", "x"], "--share: 'x' is no number"),
        (["--share", "0.1,"], "--share: '' is no number"),
        (["--share", "0"], "--share: 0 is not above 0"),
        (["--share", "1.5"], "--share: 1.5 is not"),
        (["--share", "nan"], "--share: nan is not"),
        (["--share", "0.01"], "less than one"),
        (["--policy", "fifo"], "no policy 'fifo'; known are lru, lru-per-layer, aged, density"),
        (["--policy", "no.py:Mine"], "no.py is no Python file"),
        (["--workers", "0"], "--workers is 0"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    trace: Path, arguments: list[str], problem: str
) -> None:
    done = run(trace, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_or_empty_trace_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEAD)
    assert run(path).stderr == f"expertd: {path} has no rows; nothing was used.\n"
    path.write_text(HEAD + "decode,0,0,9\n")
    done = run(path)
    assert done.stderr == f"expertd: {path}, line 5: an expert is 9; it must be 0 to 7.\n"
    assert done.returncode == 2

"""Every part of the benchmark runs, in its quickest form; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

from bench import prefetch, store
from bench.figures import compared, counted, quartiles


@pytest.mark.parametrize("part", ["cold", "hints", "hits", "calls", "restart"])
def test_a_part_runs(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    store.main(["--quick", "--json", "--only", part])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures
    for figure in figures:
        assert figure["part"] == part
        assert figure["low"] <= figure["high"]
        assert (figure["goal"] == "") == (figure["met"] is None)


def test_hints_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    prefetch.main(["--quick", "--json", "--only", "example"])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures[0]["what"] == "example, 50 % in RAM: decode"
    assert all(figure["ours"] >= 0 for figure in figures)


def test_residency_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = store.default_traces()
    if not traces:
        pytest.skip("no trace lies beside this repository")
    rows = traces[0].read_text().splitlines()
    start = next(i for i, row in enumerate(rows) if row.startswith("decode,"))
    head = next(i for i, row in enumerate(rows) if row.startswith("phase,")) + 1
    trace = tmp_path / "short.csv"
    trace.write_text("\n".join(rows[:head] + rows[start : start + 2000]) + "\n")
    store.main(["--quick", "--json", "--only", "residency", "--trace", str(trace)])
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert 0 < figure["limit"] < 100


def test_the_table_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        compared("calls", "a call", "us", [(3.0, 2.0), (4.0, 2.0), (9.0, 3.0)], at_most=1.5),
        counted("hits", "a hit", "us", [1.0, 2.0, 4.0], at_most=5),
    ]
    store.show(figures)
    shown = capsys.readouterr().out
    assert "2.00 (1.75 to 2.50)" in shown
    assert "missed" in shown
    assert "2.00 (1.50 to 3.00)" in shown


def test_one_value_has_no_spread() -> None:
    assert quartiles([2.0]) == (2.0, 2.0)

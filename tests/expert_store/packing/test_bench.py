"""The quantizer's benchmark runs, in its quickest form; its seconds are not judged here."""

import json
from pathlib import Path

import pytest

from bench import quantize


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--scheme", "paper-3bit", "--dir", str(tmp_path)]
    quantize.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    (matrix,) = report["matrices"]
    assert matrix["precision"] == "3g64m"
    assert matrix["error"] <= 1.001 * matrix["hqq_error"]
    assert [row["optimize"] for row in report["packs"]] == [True, False]
    assert not list(tmp_path.iterdir())


def test_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize.main(["--quick", "--scheme", "4bit", "--dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "4g64" in shown
    assert "minutes" in shown

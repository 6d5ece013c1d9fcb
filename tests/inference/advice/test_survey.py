"""Which of all known models fit, and what is said of them."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from expertd_inference.advice import report, survey
from expertd_inference.advice.advisor import Measured, Question
from expertd_inference.advice.twin import Twin
from expertd_inference.advice.values import Need, Reading
from expertstore.errors import InvalidInputError
from tests.inference.advice.test_prediction import GIB, HOST

SLOW, FAST = Reading(0.001, 0.004, 8), Reading(0.016, 0.064, 8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host whose kernels read 10 GB/s and whose RAM is what is asked for; nothing is run."""

    def of(free: int, **options: Any) -> survey.Survey:
        def measure(needs: list[Need], *_: Any) -> Measured:
            twin = Twin(needs[0], 0.010, 0.001, 300 << 20)
            seconds = {need: need.token_bytes / 10e9 for need in needs}
            host = replace(HOST, ram_bytes=free)
            return Measured(host, twin, seconds, {"small": SLOW, "large": FAST}, "It is busy.")

        monkeypatch.setattr(survey, "memory_available", lambda: free)
        monkeypatch.setattr(survey, "measure", measure)
        monkeypatch.setattr(survey, "SHAPES", ["olmoe-1b-7b", "granite-3.0-1b-a400m"])
        return survey.survey(Question(**options), lambda _: None)

    return of


def test_what_fits_the_largest_first(measured: Any) -> None:
    found = measured(16 * GIB)
    names = [model.name for model, _ in found.rows]
    assert names == sorted(names, key=["olmoe-1b-7b", "granite-3.0-1b-a400m"].index)
    assert all(row.fits and row.ram_bytes <= 16 * GIB for _, row in found.rows)
    for name in {*names}:
        speeds = [row.typical for model, row in found.rows if model.name == name]
        assert speeds == sorted(speeds, reverse=True)
    schemes = {(model.name, row.scheme): row for model, row in found.rows}
    assert schemes["olmoe-1b-7b", "bf16"].share == 1.0


def test_what_does_not_fit_whole_fits_in_part_or_not_at_all(measured: Any) -> None:
    rows = {(model.name, row.scheme): row for model, row in measured(6 * GIB).rows}
    assert rows["olmoe-1b-7b", "bf16"].share == 0.25
    assert rows["olmoe-1b-7b", "4bit"].share == 1.0
    assert ("olmoe-1b-7b", "bf16") not in {
        (model.name, row.scheme) for model, row in measured(3 * GIB).rows
    }
    with pytest.raises(InvalidInputError, match="No known model fits"):
        measured(100 << 20)


def test_a_budget_that_is_given_is_kept(measured: Any) -> None:
    for model, row in measured(16 * GIB, ram_bytes=GIB).rows:
        assert row.budget_bytes <= GIB, model.name


def test_shown_and_for_programs(measured: Any) -> None:
    found = measured(16 * GIB)
    out = io.StringIO()
    report.show_survey(found, Console(file=out, width=120))
    assert out.getvalue().count("olmoe-1b-7b") == 2, "once in the table, once in the next command"
    assert "It is busy." in out.getvalue()
    assert "expert-run advise --model olmoe-1b-7b" in out.getvalue()
    plain = report.survey_as_json(found)
    assert plain["warning"] == "It is busy."
    assert len(plain["fits"]) == len(found.rows)
    assert {"model", "scheme", "ram_bytes", "tokens_per_second"} <= plain["fits"][0].keys()

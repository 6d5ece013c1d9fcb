from pathlib import Path
from xml.sax.saxutils import escape

from tests.conformance.cases import Case, Outcome, Report, details_of, overview_of, read_cases

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.api_resources.chat.test_completions.TestCompletions" name="good"/>
<testcase classname="tests.api_resources.chat.test_completions.TestAsyncCompletions" name="bad">
<failure message="it broke&#10;here">more</failure></testcase>
<testcase classname="tests.api_resources.test_models.TestModels" name="other">
<error message="x">E   suffix is not supported</error></testcase>
<testcase classname="unit.test_models" name="skipped"><skipped message="not on linux"/></testcase>
</testsuite></testsuites>"""


def test_a_failure_with_a_reason_does_not_apply(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    cases = [*read_cases(path, {"suffix is": "fills no gaps", "bad.*not it": "never"})]
    assert [(case.outcome, case.reason) for case in cases] == [
        (Outcome.PASSED, ""),
        (Outcome.FAILED, "it broke"),
        (Outcome.NOT_APPLICABLE, "fills no gaps"),
        (Outcome.NOT_APPLICABLE, "skips: not on linux"),
    ]
    report = Report("suite", "1", cases, ["| figures |"])
    assert report.failed == [cases[1]]
    assert details_of(report).splitlines() == [
        "| tests of | passed | failed | not applicable |",
        "|---|---|---|---|",
        "| `chat.test_completions` | 1 | 1 | 0 |",
        "| `test_models` | 0 | 0 | 2 |",
        "",
        "| not applicable | cases |",
        "|---|---|",
        "| fills no gaps | 1 |",
        "| skips: not on linux | 1 |",
        "",
        "| figures |",
    ]
    assert overview_of([report]).splitlines()[2:] == ["| suite 1 | 1 | 1 | 2 |"]


def test_a_reason_may_be_of_a_name_and_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    cases = [*read_cases(path, {"bad.*it broke": "words of its own model"})]
    assert cases[1].reason == "words of its own model"
    assert cases[2].outcome is Outcome.FAILED


def test_reasons_are_not_found_in_the_source_of_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    said = "def ask():\n>   assert text, 'is empty'\nE   KeyError: 'text'"
    path.write_text(
        f'<s><testcase name="n"><failure message="m">{escape(said)}</failure></testcase></s>'
    )
    (case,) = read_cases(path, {"is empty": "never"})
    assert (case.outcome, case.reason) == (Outcome.FAILED, "m")
    (case,) = read_cases(path, {"KeyError: 'text'": "no texts"})
    assert case.reason == "no texts"


def test_one_file_needs_no_table_of_files() -> None:
    report = Report("aiperf", "1", [Case("aiperf", "one", Outcome.PASSED)])
    assert details_of(report) == ""

from pathlib import Path

from tests.conformance.cases import Outcome, read_cases, table_of

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.api_resources.chat.test_completions.TestCompletions" name="good"/>
<testcase classname="tests.api_resources.chat.test_completions.TestAsyncCompletions" name="bad">
<failure message="it broke">more</failure></testcase>
<testcase classname="tests.api_resources.test_models.TestModels" name="other">
<error message="x">suffix is not supported</error></testcase>
</testsuite></testsuites>"""


def test_a_failure_with_a_reason_does_not_apply(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    cases = [*read_cases(report, {"suffix is": "fills no gaps"})]
    assert [case.outcome for case in cases] == [*Outcome]
    assert table_of(cases).splitlines() == [
        "| tests of | passed | failed | not applicable |",
        "|---|---|---|---|",
        "| `chat.test_completions` | 1 | 1 | 0 |",
        "| `test_models` | 0 | 0 | 1 |",
        "",
        "| not applicable | cases |",
        "|---|---|",
        "| fills no gaps | 1 |",
    ]

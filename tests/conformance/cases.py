"""Cases of a suite that others wrote: which passed, which failed, and which do not apply."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from xml.etree import ElementTree


class Outcome(StrEnum):
    """Of one case."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Case:
    """One case; ``reason`` says why it does not apply, or what a failure said."""

    file: str
    name: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What a suite, at its version, made of the server; ``figures`` are tables in Markdown."""

    suite: str
    version: str
    cases: Sequence[Case]
    figures: Sequence[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Case]:
        """Those that should have passed."""
        return [case for case in self.cases if case.outcome is Outcome.FAILED]


def read_cases(junit: Path, not_applicable: Mapping[str, str]) -> Iterator[Case]:
    """The cases of a JUnit report.

    ``not_applicable`` has reasons by patterns of a case's name, or of its name and what the
    failure says, as in ``test_name.*it broke``. A case that fails and has such a reason does not
    apply; one that passes has passed, and one that its suite skips has the suite's reason.
    """
    for case in ElementTree.parse(junit).iter("testcase"):
        file, name = case.get("classname", ""), case.get("name", "")
        skipped = case.find("skipped")
        said = " ".join(_said(one) for kind in ("failure", "error") for one in case.findall(kind))
        pairs = not_applicable.items()
        reasons = (why for what, why in pairs if re.search(what, f"{name} {said}", re.DOTALL))
        if skipped is not None:
            yield Case(file, name, Outcome.NOT_APPLICABLE, f"skips: {skipped.get('message', '')}")
        elif not said:
            yield Case(file, name, Outcome.PASSED)
        elif (reason := next(reasons, None)) is not None:
            yield Case(file, name, Outcome.NOT_APPLICABLE, reason)
        else:
            yield Case(file, name, Outcome.FAILED, said.strip().partition("\n")[0][:200])


def _said(failure: ElementTree.Element) -> str:
    """The message, and pytest's lines of the error: no source, which has other errors' words."""
    lines = (failure.text or "").splitlines()
    return "\n".join([failure.get("message", ""), *(one for one in lines if one[:2] == "E ")])


def overview_of(reports: Sequence[Report]) -> str:
    """Markdown: counts by suite."""
    return _table(
        "suite", [(f"{report.suite} {report.version}", report.cases) for report in reports]
    )


def details_of(report: Report) -> str:
    """Markdown: counts by file, the reasons of what does not apply, and figures."""
    files = sorted({_subject(case.file) for case in report.cases})
    rows = [
        (f"`{file}`", [case for case in report.cases if _subject(case.file) == file])
        for file in files
    ]
    parts = [_table("tests of", rows)] if len(files) > 1 else []
    reasons = Counter(
        case.reason for case in report.cases if case.outcome is Outcome.NOT_APPLICABLE
    )
    if reasons:
        lines = ["| not applicable | cases |", "|---|---|"]
        parts.append(
            "\n".join(lines + [f"| {why} | {num} |" for why, num in reasons.most_common()])
        )
    return "\n\n".join([*parts, *report.figures])


def _table(subject: str, rows: Sequence[tuple[str, Sequence[Case]]]) -> str:
    lines = [f"| {subject} | passed | failed | not applicable |", "|---|---|---|---|"]
    for name, cases in rows:
        counts = Counter(case.outcome for case in cases)
        lines.append(f"| {name} | {' | '.join(str(counts[outcome]) for outcome in Outcome)} |")
    return "\n".join(lines)


def _subject(file: str) -> str:
    """``chat.test_completions``, without the class, which says only sync or async."""
    parts = re.sub(r"^(tests\.api_resources|unit)\.", "", file).split(".")
    return ".".join(part for part in parts if not part.startswith("Test"))

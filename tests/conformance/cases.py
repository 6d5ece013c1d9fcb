"""Cases of a suite that others wrote: which passed, which failed, and which do not apply."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    """One case; ``reason`` says why it does not apply."""

    file: str
    name: str
    outcome: Outcome
    reason: str = ""


def read_cases(junit: Path, not_applicable: Mapping[str, str]) -> Iterator[Case]:
    """The cases of a JUnit report.

    ``not_applicable`` has reasons by patterns of what a failure says. A case that fails and has
    such a reason does not apply; one that passes has passed.
    """
    for case in ElementTree.parse(junit).iter("testcase"):
        file, name = case.get("classname", ""), case.get("name", "")
        said = " ".join(
            f"{one.get('message', '')} {one.text or ''}"
            for kind in ("failure", "error")
            for one in case.findall(kind)
        )
        reasons = (why for what, why in not_applicable.items() if re.search(what, said))
        if not said:
            yield Case(file, name, Outcome.PASSED)
        elif (reason := next(reasons, None)) is not None:
            yield Case(file, name, Outcome.NOT_APPLICABLE, reason)
        else:
            yield Case(file, name, Outcome.FAILED)


def table_of(cases: list[Case]) -> str:
    """Markdown: counts by file, and the reasons of what does not apply."""
    lines = ["| tests of | passed | failed | not applicable |", "|---|---|---|---|"]
    for subject in sorted({_subject(case.file) for case in cases}):
        counts = Counter(case.outcome for case in cases if _subject(case.file) == subject)
        row = " | ".join(str(counts[outcome]) for outcome in Outcome)
        lines.append(f"| `{subject}` | {row} |")
    lines += ["", "| not applicable | cases |", "|---|---|"]
    reasons = Counter(case.reason for case in cases if case.reason)
    lines += [f"| {reason} | {num} |" for reason, num in reasons.most_common()]
    return "\n".join(lines)


def _subject(file: str) -> str:
    """``chat.test_completions``, without the class, which says only sync or async."""
    parts = file.removeprefix("tests.api_resources.").split(".")
    return ".".join(part for part in parts if not part.startswith("Test"))

"""What a stage of ``make gpu-slot`` finds: one JSON line each, written when it is known."""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
MAX_REASON = 400
SOME_FAILED = 3
"""The exit code of a stage whose rows say what failed; one that crashed has another."""


class Rows:
    """Appends to ``FILE`` in ``folder``; several processes may, each line is one write.

    A row has ``stage`` and ``what``; ``status`` if it has no result: failed, skipped (only a GPU
    can tell) or cut (there was no time); ``arena`` and ``steps`` where a worker ran
    (:mod:`bench.gpu_state`); and whatever else was found.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.path, self.stage = folder / FILE, stage
        self.num_failed = 0

    def put(self, what: str, **values: Any) -> None:  # noqa: ANN401 - whatever JSON has
        """A row."""
        line = json.dumps({"stage": self.stage, "what": what, **values}, default=str)
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def failed(self, what: str, reason: BaseException | str, **values: Any) -> None:  # noqa: ANN401
        """Something that was to work and did not; ``values`` are what is known all the same."""
        self.num_failed += 1
        if isinstance(reason, BaseException):
            reason = f"{type(reason).__name__}: {reason}"
        self.put(what, status="failed", reason=reason[:MAX_REASON], **values)

    def skipped(self, what: str, reason: str = "only a GPU can tell") -> None:
        """Something that cannot be known here."""
        self.put(what, status="skipped", reason=reason)

    def cut(self, what: str, reason: str) -> None:
        """Something for which there was no time."""
        self.put(what, status="cut", reason=reason)

    @contextmanager
    def part(self, what: str) -> Iterator[dict[str, Any]]:
        """A row of what the block puts into the dict, with the seconds that it took.

        If the block fails, the row says so; others go on.
        """
        begin, found = time.monotonic(), dict[str, Any]()
        try:
            yield found
        except Exception as error:
            traceback.print_exc()
            self.failed(what, error, **found)
        else:
            self.put(what, **found, seconds=round(time.monotonic() - begin, 1))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows; a line that was cut in the middle is left out."""
    rows = []
    path = folder / FILE
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows

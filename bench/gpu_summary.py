"""The rows of ``make gpu-slot`` as a page that can be read: a table per stage."""

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = (
    "# What the GPU host told\n\n"
    "`arena` is how the GPU read the shared memory (registered or staged), `steps` how steps of "
    "one token ran as CUDA graphs (off, segments or whole); a dash where no worker ran.\n"
)
_COLUMNS = ("what", "arena", "steps", "found")
_APART = {"stage", "what", "arena", "steps", "status", "reason"}
_MAX_CELL = 240


def summary(rows: Sequence[Mapping[str, Any]], took: Mapping[str, str]) -> str:
    """A page; ``took`` says of each stage, in order, how it ended."""
    lines = [HEAD, "| stage | ended | rows | failed |", "|---|---|---|---|"]
    for stage, ended in took.items():
        own = [row for row in rows if row["stage"] == stage]
        num_failed = sum(row.get("status") == "failed" for row in own)
        lines.append(f"| {stage} | {ended} | {len(own)} | {num_failed or ''} |")
    for stage in took:
        own = [row for row in rows if row["stage"] == stage]
        if own:
            lines += ["", f"## {stage}", "", f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|"]
            lines += [f"| {' | '.join(_cells(row))} |" for row in own]
    return "\n".join([*lines, ""])


def line_of(row: Mapping[str, Any]) -> str:
    """A row, for a terminal."""
    what, arena, steps, found = _cells(row)
    state = "" if (arena, steps) == ("-", "-") else f" [{arena}, {steps}]"
    return f"  {what}{state}: {found}"


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    found = ", ".join(
        f"{name} {_value(value)}" for name, value in row.items() if name not in _APART
    )
    if status := row.get("status"):
        found = f"**{status}**: {row.get('reason', '')} {found}"
    found = found.strip().replace("|", "/").replace("\n", " ")
    if len(found) > _MAX_CELL:
        found = f"{found[:_MAX_CELL]}..."
    return str(row["what"]), row.get("arena") or "-", row.get("steps") or "-", found


def _value(value: Any) -> str:  # noqa: ANN401 - whatever JSON has
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)

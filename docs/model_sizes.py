"""Writes the table of sizes in docs/choosing.md anew: what published models need, by scheme.

Computed from the models' shapes by the packer's own plan, as ``expert-run advise`` does.

Example: python docs/model_sizes.py docs/choosing.md
"""

import re
import sys
from pathlib import Path

from expertd.packing.shapes import SHAPES
from expertd_inference.advice.models import find_model
from expertd_inference.advice.values import Need

BEGIN, END = "<!-- sizes: made by docs/model_sizes.py -->", "<!-- end of sizes -->"
RATE = 50e9
"""Bytes per second, of a desktop's memory, for the last column."""
_GIB = 1 << 30


def table() -> str:
    """In Markdown: a row per shape."""
    columns = (
        "`--model`",
        "experts in 4 bits",
        "`paper-3bit`",
        "`paper-2bit`",
        "trunk",
        "least budget",
        "a token reads",
        f"tokens/s at {RATE / 1e9:.0f} GB/s, at most",
    )
    rows = [_row(name) for name in SHAPES]
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(page: str) -> str:
    """``page`` with its table made anew. Raises ValueError if it has no place for one."""
    made, count = re.subn(
        f"({re.escape(BEGIN)}\n).*?({re.escape(END)})",
        lambda match: f"{match[1]}\n{table()}\n\n{match[2]}",
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"the page has no {BEGIN} and {END}, once each")
    return made


def _row(name: str) -> tuple[str, ...]:
    needs = {need.scheme: need for need in find_model(name).needs}
    four = needs["as-is" if "as-is" in needs else "4bit"]
    return (
        f"`{name}`",
        _gib(four.expert_bytes) + (" (MXFP4)" if four.scheme == "as-is" else ""),
        *(_experts(needs.get(scheme)) for scheme in ("paper-3bit", "paper-2bit")),
        _gib(four.trunk_bytes),
        _gib(four.working_set_bytes),
        _gib(four.token_bytes),
        f"{RATE / four.token_bytes:.3g}",
    )


def _experts(need: Need | None) -> str:
    return "" if need is None else _gib(need.expert_bytes)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f}" if num_bytes >= _GIB else f"{num_bytes / _GIB:.2f}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(render(path.read_text()))

"""docs/benchmarks.md, made of docs/benchmarks/*.json: never edited by hand."""

from pathlib import Path

from bench.drawing import draw
from bench.figures import Figure
from bench.parts import PARTS
from bench.results import Result, Table, read_result

_HEAD = """\
# Benchmarks

<!-- Made by `python -m bench --page` of the files in docs/benchmarks. Do not edit. -->

Everything here was measured by `make bench` (`python -m bench --help`), on this code, on the host
that each part names. What is ours and its limit, or another program, are measured in turns in the
same minutes: machines differ and drift, so read the **ratios**: medians, and in brackets what the
middle half of the turns lies between. A goal that is missed says so.
"""


def write_page(out: Path) -> Path:
    """Writes ``benchmarks.md`` into ``out`` and the plots beside the results."""
    folder = out / "benchmarks"
    results = [
        read_result(folder / f"{name}.json") for name in PARTS if (folder / f"{name}.json").exists()
    ]
    for result in results:
        for plot in result.plots:
            draw(plot, folder)
    path = out / "benchmarks.md"
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(render(results, sorted(folder.glob("gpu-*.md"))))
    partial.rename(path)
    return path


def render(results: list[Result], gpu_pages: list[Path]) -> str:
    """The page's text."""
    blocks = [_HEAD, *_goals(results)]
    for result in results:
        blocks += _part(result)
    blocks.append("## On a GPU\n")
    if gpu_pages:
        blocks += [f"- [{page.stem}](benchmarks/{page.name})\n" for page in gpu_pages]
    else:
        blocks.append(
            "Nothing here yet: `make gpu-bench` has not run on a host with a GPU"
            " ([gpu-hosts.md](gpu-hosts.md)).\n"
        )
    return "\n".join(blocks)


def _goals(results: list[Result]) -> list[str]:
    judged = [(each, figure) for each in results for figure in each.figures if figure.goal]
    if not judged:
        return []
    met = sum(bool(figure.met) for _, figure in judged)
    missed = [(each, figure) for each, figure in judged if not figure.met]
    lines = [f"## Goals\n\n{met} of {len(judged)} are met."]
    if missed:
        lines[0] += " Missed:\n"
        rows = [
            (f"[{each.part}](#{_anchor(each)})", *_cells(figure)[:-1]) for each, figure in missed
        ]
        lines.append(_markdown(("part", *_COLUMNS[:-1]), rows))
    return [*lines, ""]


def _part(result: Result) -> list[str]:
    part = PARTS[result.part]
    blocks = [f"## {part.title}\n", f"{part.text()}\n"]
    blocks += [f"![{plot.title}](benchmarks/{plot.name}.svg)\n" for plot in result.plots]
    blocks += [_table(table) for table in result.tables]
    if result.figures:
        blocks.append(_markdown(_COLUMNS, [_cells(figure) for figure in result.figures]) + "\n")
    if result.missing:
        blocks.append("Not measured:\n")
        blocks.append("\n".join(f"- {each}" for each in result.missing) + "\n")
    host = "; ".join(f"{name} {value}" for name, value in result.host.items())
    quick = ", **a quick run, not to be quoted**" if result.quick else ""
    blocks.append(
        f"<sub>`{result.command}`, {result.date}, commit {result.commit}, {result.seconds:.0f} s,"
        f" load average before {result.load:g}{quick}. {host}.</sub>\n"
    )
    return blocks


_COLUMNS = ("what", "ours", "its limit", "ratio", "goal", "")


def _cells(figure: Figure) -> tuple[str, ...]:
    spread = ""
    if figure.low is not None and figure.high is not None and figure.low != figure.high:
        spread = f" ({_short(figure.low)} to {_short(figure.high)})"
    ours, limit, ratio = f"{_short(figure.ours)} {figure.unit}", "", ""
    if figure.ratio is None:
        ours += spread
    else:
        ratio = f"{_short(figure.ratio)}{spread}"
    if figure.limit is not None:
        limit = f"{_short(figure.limit)} {figure.unit}"
    met = {True: "met", False: "**missed**", None: ""}[figure.met]
    return figure.what, ours, limit, ratio, figure.goal.replace(">=", "≥").replace("<=", "≤"), met


def _short(value: float) -> str:
    """Three digits; near 1, where what matters of a ratio is the rest, three behind the point."""
    return f"{value:.3f}" if 0.9 <= value < 1.1 else f"{value:.3g}"


def _table(table: Table) -> str:
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.title}**\n\n{_markdown(table.columns, table.rows)}{note}\n"


def _markdown(
    columns: tuple[str, ...], rows: "list[tuple[str, ...]] | tuple[tuple[str, ...], ...]"
) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _anchor(result: Result) -> str:
    title = PARTS[result.part].title.lower()
    return "".join(each for each in title if each.isalnum() or each in " -").replace(" ", "-")

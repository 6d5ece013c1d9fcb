"""Plots as pictures: matplotlib, as SVG, the same bytes for the same figures."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure as Sheet

from bench.results import Curve, Plot

mpl.use("svg")
_STYLE = {
    "svg.hashsalt": "expertd",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
_SIZE = (7.2, 4.0)  # inches
_MOST_OF_A_TICK = 0.8


def draw(plot: Plot, folder: Path) -> Path:
    """Writes ``NAME.svg``; on white, so that it can be read on a dark page as well."""
    with mpl.rc_context(_STYLE):
        sheet = Sheet(figsize=_SIZE, layout="constrained", facecolor="white")
        axes = sheet.subplots()
        axes.set_title(plot.title, loc="left", fontsize=11)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        if plot.x_log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        for number, curve in enumerate(plot.curves):
            if plot.ticks:
                _bars(axes, curve, number, len(plot.curves))
            else:
                _line(axes, curve)
        if plot.ticks:
            axes.set_xticks(range(len(plot.ticks)), plot.ticks)
            axes.grid(visible=False, axis="x")
        if plot.y_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if len(plot.curves) > 1:
            axes.legend(fontsize=9)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{plot.name}.svg"
        sheet.savefig(path, metadata={"Date": None, "Creator": None})
    return path


# matplotlib's axes are typed, but its arguments hardly.
def _line(axes, curve: Curve) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    style = "--" if curve.dashed else "-"
    (line,) = axes.plot(curve.x, curve.y, style, marker="o", markersize=4, label=curve.label)
    if curve.low:
        axes.fill_between(curve.x, curve.low, curve.high, alpha=0.15, color=line.get_color())


def _bars(axes, curve: Curve, number: int, count: int) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    width = _MOST_OF_A_TICK / count
    at = [x + (number - (count - 1) / 2) * width for x in curve.x]
    spread = None
    if curve.low:
        below = [max(0.0, y - low) for y, low in zip(curve.y, curve.low, strict=True)]
        above = [max(0.0, high - y) for y, high in zip(curve.y, curve.high, strict=True)]
        spread = [below, above]
    hatch = "//" if curve.dashed else None
    axes.bar(at, curve.y, width, label=curve.label, yerr=spread, capsize=2, hatch=hatch)

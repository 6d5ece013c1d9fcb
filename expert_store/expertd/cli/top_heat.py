"""The heat map of ``expertd top``: two layers in a line of characters, an expert a column."""

from itertools import zip_longest

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from expertd.residency.heat_map import HeatMap

# From "in RAM, unused" to "hottest"; and what is not in RAM, from never used to wanted.
_RESIDENT = ((22, 50, 92), (33, 119, 148), (72, 178, 120), (205, 200, 70), (255, 244, 190))
_ABSENT = ((38, 38, 38), (120, 30, 40), (230, 60, 50))
_PLAIN_RESIDENT = "-=+*#@"
_PLAIN_ABSENT = ".o"
_LABEL = 5

Colour = tuple[int, int, int]


def draw_heat(heat: HeatMap, width: int, height: int) -> "_Drawing":
    """A drawing of at most ``width`` columns and ``height`` lines, the last a legend."""
    return _Drawing(heat, width, height)


class _Drawing:
    """In colour two layers a line, by half blocks; without colour one, by characters."""

    def __init__(self, heat: HeatMap, width: int, height: int) -> None:
        self._heat, self._width, self._height = heat, width, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        lines = max(1, self._height - 1)
        columns = max(1, self._width - _LABEL - 1)
        shrunk = self._heat.shrink(lines * (2 if coloured else 1), columns)
        # Few experts: cells as wide as there is room for, up to what looks like squares.
        stretch = max(1, min(2 if coloured else 1, columns // max(1, shrunk.heat.shape[1])))
        yield from self._coloured(shrunk, stretch) if coloured else self._plain(shrunk)
        yield self._legend(coloured, shrunk)

    def _coloured(self, shrunk: HeatMap, stretch: int) -> RenderResult:
        colours = _colours(shrunk)
        for line in range(0, len(shrunk.layers), 2):
            yield Segment(f"{shrunk.layers[line]:>{_LABEL - 1}} ", Style(dim=True))
            upper = colours[line]
            lower = colours[line + 1] if line + 1 < len(colours) else []
            for top, bottom in zip_longest(upper, lower):
                if top is None:
                    yield Segment(" " * stretch)
                    continue
                style = Style(color=_hex(top), bgcolor=_hex(bottom) if bottom is not None else None)
                yield Segment("▀" * stretch, style)
            yield Segment.line()

    def _plain(self, shrunk: HeatMap) -> RenderResult:
        for layer, heat, resident in zip(shrunk.layers, shrunk.heat, shrunk.resident, strict=True):
            cells = "".join(_character(*cell) for cell in zip(heat, resident, strict=True))
            yield Segment(f"{layer:>{_LABEL - 1}} {cells.rstrip()}")
            yield Segment.line()

    def _legend(self, coloured: bool, shrunk: HeatMap) -> Text:
        """The scales, and what was shrunk; in few columns without what explains least."""
        here, away = Text(_PLAIN_RESIDENT), Text(_PLAIN_ABSENT)
        if coloured:
            here = Text.assemble(*(("█", _hex(_blend(_RESIDENT, n / 9))) for n in range(10)))
            away = Text.assemble(*(("█", _hex(_blend(_ABSENT, n / 4))) for n in range(5)))
        indent = " " * _LABEL
        long = Text.assemble(
            indent, "in RAM, cold ", here, " hot   not in RAM, cold ", away, " wanted"
        )
        short = Text.assemble("RAM ", here, " hot  disk ", away, " wanted")
        legend = long if long.cell_len <= self._width else short
        rows, columns = self._heat.heat.shape
        if shrunk.heat.shape != (rows, columns):
            note = f"   {rows} x {columns} shown as {' x '.join(map(str, shrunk.heat.shape))}"
            if legend.cell_len + len(note) <= self._width:
                legend.append(note)
        legend.no_wrap, legend.overflow = True, "ellipsis"
        return legend


def _colours(shrunk: HeatMap) -> list[list[Colour | None]]:
    return [
        [_colour(float(heat), float(share)) for heat, share in zip(row, shares, strict=True)]
        for row, shares in zip(shrunk.heat, shrunk.resident, strict=True)
    ]


def _colour(heat: float, share: float) -> Colour | None:
    if np.isnan(heat):
        return None
    here, away = _blend(_RESIDENT, heat), _blend(_ABSENT, heat)
    mixed = [round(a * share + b * (1 - share)) for a, b in zip(here, away, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _character(heat: float, share: float) -> str:
    if np.isnan(heat):
        return " "
    scale = _PLAIN_RESIDENT if share >= 0.5 else _PLAIN_ABSENT
    return scale[min(len(scale) - 1, int(heat * len(scale)))]


def _blend(scale: tuple[Colour, ...], value: float) -> Colour:
    """``value`` from 0 to 1 on a scale of colours."""
    place = max(0.0, min(1.0, value)) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    part = place - low
    a, b = scale[low], scale[low + 1]
    mixed = [round(x + (y - x) * part) for x, y in zip(a, b, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)

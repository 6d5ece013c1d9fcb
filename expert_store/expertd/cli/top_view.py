"""One frame of ``expertd top``: what is drawn of the last two samples."""

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertd.cli.progress import format_seconds
from expertd.cli.rates import hit_rate, rates
from expertd.cli.top_feed import Sample
from expertd.cli.top_heat import draw_heat
from expertstore.sizes import format_bytes

_MAX_MODELS = 8
_MIN_SESSIONS = 3
_MAX_SESSIONS = 10
_BAR, _NARROW_BAR = 24, 12
_WIDE = 100
"""From so many columns on there is room for long bars."""
_FIGURES = 38
"""Columns of a tier's line without its bar."""
_TALL = 16
"""In fewer lines than that the tiers have one each."""
_MAX_NAME = 24
"""Columns for the name of a model in a table."""
_GAP = 3
"""Columns between two of a table's."""
_TABLE_LINES = 2
"""A table's head: names and a rule."""
_BOTH_TABLES = 8
"""Below so many lines there are no sessions, but more models."""
_HEAT_LINES = 2
"""The heat map's title and legend."""
_MAX_HEAT_LINES = 24
_ENDLESS = 10**9
_INDENT = "      "
# In their order, and which goes last if there is no room for all.
_MODEL_COLUMNS = {
    "model": 0, "resident": 1, "": 9, "hits": 2, "since start": 8, "uses/s": 5, "NVMe/s": 3,
    "evicted/s": 6, "fetch": 4, "hints used": 7,
}  # fmt: skip
_SESSION_COLUMNS = {
    "session": 0, "pid": 1, "uid": 6, "role": 8, "model": 5, "attached": 7, "hits": 3,
    "uses/s": 4, "epoch lag": 2,
}  # fmt: skip
_LATE_SECONDS = 3.0
_NOTHING: dict[str, Any] = {}


class View:
    """What is known of the daemon at ``socket``, and how it looks."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._sample: Sample | None = None
        self._rates: dict[str, Any] = rates(None, _NOTHING)
        self._waiting = True
        self._taken_at = 0.0
        self.version = 0
        """Changes when a frame would."""

    @property
    def has_rates(self) -> bool:
        """Whether two samples could be compared."""
        return bool(self._rates["interval_seconds"])

    def take(self, sample: Sample, now: float) -> None:
        """Takes in a sample; ``now`` in seconds of the monotonic clock."""
        before = self._sample.stats if self._sample is not None else None
        self._rates = rates(before, sample.stats)
        self._sample, self._waiting, self._taken_at = sample, False, now
        self.version += 1

    def wait(self) -> None:
        """Takes note that no daemon answers."""
        if not self._waiting:
            self._waiting = True
            self.version += 1

    def is_late(self) -> bool:
        """Whether a daemon that is connected has said nothing for several intervals."""
        allowed = _LATE_SECONDS + 3 * self._rates["interval_seconds"]
        return not self._waiting and time.monotonic() - self._taken_at > allowed

    def next_model(self) -> str:
        """The model behind the one whose heat is shown."""
        if self._sample is None or not self._sample.stats["models"]:
            return ""
        names = [model["name"] for model in self._sample.stats["models"]]
        shown = self._sample.model
        return str(names[(names.index(shown) + 1) % len(names)] if shown in names else names[0])

    def plain(self) -> dict[str, Any]:
        """The last sample, for programs."""
        assert self._sample is not None
        return {"stats": self._sample.stats, "rates": self._rates}

    def frame(self, width: int, height: int | None) -> RenderableType:
        """All of it in ``width`` columns and at most ``height`` lines, None: as it comes.

        What matters less makes room: columns of the tables, then the heat map, rows of sessions,
        rows of models; rows that are left out are counted.
        """
        if self._sample is None:
            return Text(f"waiting for expertd at {self._socket}")
        stats = self._sample.stats
        height = _ENDLESS if height is None else height
        tiers = self._tiers(stats, width)
        if height < _TALL:
            tiers = [lines[:1] for lines in tiers]
        head = [*self._title(stats, width), *chain.from_iterable(tiers)][:height]
        body: list[RenderableType] = [*head]
        room = height - len(head)
        models, sessions = stats["models"], self._busiest(stats["sessions"])
        both = bool(sessions) and room >= _BOTH_TABLES
        if room > _TABLE_LINES:
            most = min(_MAX_MODELS, (room // 2 if both else room) - _TABLE_LINES)
            shown, lines = _rows(len(models), most)
            body.append(self._models(models, shown, width))
            room -= lines
        if both:
            most = min(_MAX_SESSIONS, max(_MIN_SESSIONS, room // 4), room - _TABLE_LINES)
            shown, lines = _rows(len(sessions), most)
            body.append(self._sessions(sessions, shown, width))
            room -= lines
        heat = self._sample.heat
        if heat is not None and room > _HEAT_LINES:
            title = f"{self._sample.model}: layers down, experts across"
            if len(title) > width:
                title = self._sample.model[:width]
            body += [
                Text(title, style="bold"),
                draw_heat(heat, width, min(room - 1, _MAX_HEAT_LINES)),
            ]
        return Group(*body)

    def _title(self, stats: dict[str, Any], width: int) -> list[Text]:
        socket, up = str(self._socket), format_seconds(stats["uptime_seconds"])
        room = max(8, width - len(f"expertd at , up {up}"))
        if len(socket) > room:  # its end tells more
            socket = "…" + socket[1 - room :]
        parts = [Text(f"expertd at {socket}, up {up}")]
        parts[0].stylize("bold", 0, len("expertd"))
        if self._waiting:
            parts.append(Text(f"waiting for expertd at {self._socket}", "bold red"))
        elif self.is_late():
            parts.append(Text("it does not answer", "bold red"))
        if warnings := len(stats["warnings"]):
            said = f"{warnings} warning{'s' * (warnings > 1)}: expertd stats"
            parts.append(Text(said, "yellow"))
        return _flow(parts, "   ", "", width)

    def _tiers(self, stats: dict[str, Any], width: int) -> list[list[Text]]:
        """The lines of each."""
        arena = stats["arena"]
        total, used, retired = arena["bytes_total"], arena["bytes_used"], arena["retired"]
        bar = _BAR if width >= _WIDE else min(_NARROW_BAR, max(0, width - _FIGURES))
        ram = Text("RAM   ")
        ram.append_text(_bar([(used - retired, "green"), (retired, "yellow")], total, bar))
        ram.append(f" {format_bytes(used)} of {format_bytes(total)}")
        of_all = sum(model["expert_bytes"] for model in stats["models"])
        resident = sum(model["resident_bytes"] for model in stats["models"])
        read = sum(each["nvme_bytes_per_second"] for each in self._rates["models"].values())
        nvme = Text("NVMe  ")
        nvme.append_text(_bar([(resident, "green")], of_all, bar))
        nvme.append(f" {format_bytes(resident)} of {format_bytes(of_all)} in RAM")
        rows = self._rows(stats)
        return [
            _flow(
                [
                    ram,
                    Text(f"{format_bytes(retired)} of it retired"),
                    Text(f"{format_bytes(arena['locked'])} locked"),
                    Text(f"{format_bytes(arena['huge_pages'])} in huge pages"),
                ],
                ", ", _INDENT, width,
            ),
            _flow(
                [
                    nvme,
                    Text(f"{format_bytes(int(read))}/s read", "bold" if read else ""),
                    Text(f"queued {stats['queued_reads']} reads, {stats['queued_hints']} hints"),
                    Text(f"{stats['fetches_waiting']} fetches wait"),
                ],
                ", ", _INDENT, width,
            ),
            *([_flow(rows, ", ", _INDENT, width)] if rows else []),
        ]  # fmt: skip

    def _rows(self, stats: dict[str, Any]) -> list[Text]:
        """Of tables, if any model has some."""
        tables = [table for model in stats["models"] for table in model.get("tables", [])]
        if not tables:
            return []
        resident = sum(table["num_resident"] * table["row_bytes"] for table in tables)
        of_all = sum(table["num_rows"] * table["row_bytes"] for table in tables)
        rates = [each["rows"] for each in self._rates["models"].values()]
        uses = sum(each["accesses_per_second"] for each in rates)
        hits = sum((each["hit_rate"] or 0) * each["accesses_per_second"] for each in rates)
        return [
            Text(f"Rows  {format_bytes(resident)} of {format_bytes(of_all)} in RAM"),
            Text(f"{format_bytes(stats['arena']['table_bytes'])} are for them"),
            Text(f"{_number(uses)} used/s, {_share(hits / uses if uses else None)} hits"),
        ]

    def _models(self, models: list[dict[str, Any]], most: int, width: int) -> Table:
        rows = []
        for model in models[:most]:
            rate = self._rates["models"].get(model["name"], _NOTHING)
            prefetch = model["prefetch"]
            done = prefetch["useful"] + prefetch["wasted"]
            rows.append(
                {
                    "model": Text(model["name"]),
                    "resident": Text(f"{model['num_resident']}/{model['num_experts']}"),
                    "": _bar([(model["num_resident"], "green")], model["num_experts"], 8),
                    "hits": Text(_share(rate.get("hit_rate"))),
                    "since start": Text(_share(hit_rate(model["host_hits"], model["nvme_misses"]))),
                    "uses/s": Text(_number(rate.get("accesses_per_second"))),
                    "NVMe/s": Text(format_bytes(int(rate.get("nvme_bytes_per_second", 0)))),
                    "evicted/s": Text(_number(rate.get("evictions_per_second"))),
                    "fetch": Text(_milliseconds(rate.get("fetch_seconds"))),
                    "hints used": Text(_share(prefetch["useful"] / done if done else None)),
                }
            )
        return _table(_MODEL_COLUMNS, rows, len(models) - most, width)

    def _busiest(self, sessions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rate = self._rates["sessions"]
        return sorted(
            sessions,
            key=lambda row: (-row["epoch_lag"], -_busy(rate.get(row["id"])), row["id"]),
        )

    def _sessions(self, sessions: list[dict[str, Any]], most: int, width: int) -> Table:
        rows = []
        for row in sessions[:most]:
            each = self._rates["sessions"].get(row["id"], _NOTHING)
            rows.append(
                {
                    "session": Text(str(row["id"])),
                    "pid": Text(str(row["pid"] or "-")),
                    "uid": Text(str(row["uid"])),
                    "role": Text(row["role"]),
                    "model": Text(row["model"] or "-"),
                    "attached": Text(format_seconds(row["attached_seconds"])),
                    "hits": Text(_share(each.get("hit_rate"))),
                    "uses/s": Text(_number(each.get("accesses_per_second"))),
                    "epoch lag": Text(str(row["epoch_lag"]), "yellow" if row["epoch_lag"] else ""),
                }
            )
        return _table(_SESSION_COLUMNS, rows, len(sessions) - most, width)


def _busy(rate: dict[str, Any] | None) -> float:
    return float(rate["accesses_per_second"]) if rate else 0.0


def _rows(num_rows: int, most: int) -> tuple[int, int]:
    """How many of a table's rows to show in so many lines at most, and its lines with its head.

    Where not all are shown, the last line says how many are not.
    """
    shown = num_rows if num_rows <= most else most - 1
    return shown, _TABLE_LINES + shown + (shown < num_rows)


def _table(
    columns: dict[str, int], rows: Sequence[dict[str, Text]], num_more: int, width: int
) -> Table:
    """``rows`` under as many of ``columns`` as fit, those of the lowest rank first."""
    sizes = {
        name: max(len(name), *(min(_MAX_NAME, row[name].cell_len) for row in rows), 0)
        for name in columns
    }
    shown: set[str] = set()
    left = width + _GAP
    for name in sorted(columns, key=lambda name: columns[name]):
        left -= sizes[name] + _GAP
        if left < 0 and shown:
            break
        shown.add(name)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
    for name in columns:
        if name in shown:
            left_side = name in {"model", "session", "", "role"}
            justify: Literal["left", "right"] = "left" if left_side else "right"
            table.add_column(name, justify=justify, no_wrap=True, max_width=_MAX_NAME)
    for row in rows:
        table.add_row(*(row[name] for name in columns if name in shown))
    if num_more:
        table.caption, table.caption_justify = f"and {num_more} more", "left"
    return table


def _flow(parts: Sequence[Text], separator: str, indent: str, width: int) -> list[Text]:
    """``parts`` in lines of at most ``width``; one that is longer by itself is cut."""
    lines = [parts[0].copy()]
    for part in parts[1:]:
        if lines[-1].cell_len + len(separator) + part.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], separator, part)
        else:
            lines.append(Text.assemble(indent, part))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def _bar(parts: list[tuple[int, str]], total: int, width: int) -> Text:
    """Coloured shares of ``total``, by eighths of a character."""
    bar, filled = Text(), 0
    for value, style in parts:
        if value > 0 and total > 0:
            count = min(width - filled, max(1, round(width * value / total)))
            bar.append("█" * count, style)
            filled += count
    bar.append("░" * (width - filled), "bright_black")
    return bar


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"

"""One frame of ``expertd top``: what is drawn of the last two samples."""

import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertd.cli.progress import format_seconds
from expertd.cli.rates import hit_rate, rates
from expertd.cli.top_feed import Sample
from expertd.cli.top_heat import draw_heat
from expertd.sizes import format_bytes

_MAX_MODELS = 8
_MIN_SESSIONS = 3
_MAX_SESSIONS = 10
_BAR = 24
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
        """All of it in ``width`` columns and at most ``height`` lines, None: as it comes."""
        if self._sample is None:
            return Text(f"waiting for expertd at {self._socket}")
        stats = self._sample.stats
        head: list[RenderableType] = [self._title(stats, width), *self._tiers(stats)]
        num_models = min(_MAX_MODELS, len(stats["models"]))
        # Lines beside sessions and heat map: the head, two tables' heads and rules, two spaces.
        rest = 10**9 if height is None else height - len(head) - num_models - 7
        num_sessions = min(_MAX_SESSIONS, len(stats["sessions"]), max(_MIN_SESSIONS, rest // 4))
        body: list[RenderableType] = [
            *head,
            self._models(stats["models"][:num_models]),
            self._sessions(stats["sessions"], num_sessions),
        ]
        room = 24 if height is None else rest - num_sessions - 2
        heat = self._sample.heat
        if heat is not None and room >= 2:
            title = Text(f"{self._sample.model}: layers down, experts across", style="bold")
            body += [title, draw_heat(heat, width, room)]
        return Group(*body)

    def _title(self, stats: dict[str, Any], width: int) -> Text:
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append("expertd", style="bold")
        title.append(f" at {self._socket}, up {format_seconds(stats['uptime_seconds'])}")
        if self._waiting:
            title.append(f"   waiting for expertd at {self._socket}", style="bold red")
        elif self.is_late():
            title.append("   it does not answer", style="bold red")
        if warnings := len(stats["warnings"]):
            title.append(f"   {warnings} warning{'s' * (warnings > 1)}: expertd stats", "yellow")
        return title

    def _tiers(self, stats: dict[str, Any]) -> list[Text]:
        arena = stats["arena"]
        total, used, retired = arena["bytes_total"], arena["bytes_used"], arena["retired"]
        ram = Text("RAM   ", no_wrap=True, overflow="ellipsis")
        ram.append_text(_bar([(used - retired, "green"), (retired, "yellow")], total))
        ram.append(f" {format_bytes(used)} of {format_bytes(total)}")
        ram.append(
            f", {format_bytes(retired)} of it retired, {format_bytes(arena['locked'])} locked"
        )
        ram.append(f", {format_bytes(arena['huge_pages'])} in huge pages")
        of_all = sum(model["expert_bytes"] for model in stats["models"])
        resident = sum(model["resident_bytes"] for model in stats["models"])
        read = sum(each["nvme_bytes_per_second"] for each in self._rates["models"].values())
        nvme = Text("NVMe  ", no_wrap=True, overflow="ellipsis")
        nvme.append_text(_bar([(resident, "green")], of_all))
        nvme.append(f" {format_bytes(resident)} of {format_bytes(of_all)} in RAM, ")
        nvme.append(f"{format_bytes(int(read))}/s read", style="bold" if read else "")
        nvme.append(
            f", queued {stats['queued_reads']} reads, {stats['queued_hints']} hints; "
            f"{stats['fetches_waiting']} fetches wait"
        )
        return [ram, nvme]

    def _models(self, models: list[dict[str, Any]]) -> Table:
        table = _table(
            "model", "resident", "", "hits", "since start", "uses/s", "NVMe/s", "evicted/s",
            "fetch", "hints used",
        )  # fmt: skip
        for model in models:
            rate = self._rates["models"].get(model["name"], _NOTHING)
            prefetch = model["prefetch"]
            done = prefetch["useful"] + prefetch["wasted"]
            table.add_row(
                Text(model["name"]),
                f"{model['num_resident']}/{model['num_experts']}",
                _bar([(model["num_resident"], "green")], model["num_experts"], 8),
                _share(rate.get("hit_rate")),
                _share(hit_rate(model["host_hits"], model["nvme_misses"])),
                _number(rate.get("accesses_per_second")),
                f"{format_bytes(int(rate.get('nvme_bytes_per_second', 0)))}",
                _number(rate.get("evictions_per_second")),
                _milliseconds(rate.get("fetch_seconds")),
                _share(prefetch["useful"] / done if done else None),
            )
        return table

    def _sessions(self, sessions: list[dict[str, Any]], most: int) -> Table:
        table = _table("session", "pid", "uid", "role", "model", "attached", "hits",
                       "uses/s", "epoch lag")  # fmt: skip
        rate = self._rates["sessions"]
        busiest = sorted(
            sessions,
            key=lambda row: (-row["epoch_lag"], -_busy(rate.get(row["id"])), row["id"]),
        )
        if len(sessions) > most:
            table.caption = f"and {len(sessions) - most} more, less busy"
        for row in busiest[:most]:
            each = rate.get(row["id"], _NOTHING)
            table.add_row(
                str(row["id"]),
                str(row["pid"] or "-"),
                str(row["uid"]),
                row["role"],
                Text(row["model"] or "-"),
                format_seconds(row["attached_seconds"]),
                _share(each.get("hit_rate")),
                _number(each.get("accesses_per_second")),
                Text(str(row["epoch_lag"]), style="yellow" if row["epoch_lag"] else ""),
            )
        return table


def _busy(rate: dict[str, Any] | None) -> float:
    return float(rate["accesses_per_second"]) if rate else 0.0


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
    for column in columns:
        left = column in {"model", "session", "", "role"}
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _bar(parts: list[tuple[int, str]], total: int, width: int = _BAR) -> Text:
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

"""One frame of ``expertd top`` in terminals of each size: nothing that matters is cut off."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from expertd.cli.top_feed import Sample
from expertd.cli.top_view import View
from expertd.residency.heat_map import HeatMap

SOCKET = Path("/run/user/1000/expertd")
GIB = 1 << 30


def stats(uptime: float, num_models: int = 2, num_sessions: int = 3) -> dict[str, Any]:
    models = [
        {
            "name": f"qwen3-30b-a3b-{number}", "num_resident": 3072, "num_experts": 6144,
            "expert_bytes": 16 * GIB, "resident_bytes": 8 * GIB, "host_hits": int(1e6 * uptime),
            "nvme_misses": int(1e4 * uptime), "nvme_bytes_read": int(2.5 * GIB * uptime),
            "evictions": int(900 * uptime), "fetches": int(800 * uptime),
            "fetch_seconds": 9 * uptime,
            "prefetch": {"useful": 10, "wasted": 3, "issued": 20, "late": 1},
        }
        for number in range(num_models)
    ]  # fmt: skip
    sessions = [
        {
            "id": 100 + number, "pid": 1234567, "uid": 1000, "role": "worker",
            "model": "qwen3-30b-a3b-0", "attached_seconds": 36000.0, "epoch_lag": 1 + number,
            "host_hits": int(1e5 * uptime), "nvme_misses": int(1e3 * uptime),
        }
        for number in range(num_sessions)
    ]  # fmt: skip
    arena = {
        "bytes_total": 24 * GIB, "bytes_used": 20 * GIB, "retired": 1 << 30, "locked": 23 * GIB,
        "huge_pages": 22 * GIB,
    }  # fmt: skip
    return {
        "incarnation": "x", "uptime_seconds": uptime, "models": models, "sessions": sessions,
        "arena": arena, "warnings": ["degraded"], "queued_reads": 12, "queued_hints": 34,
        "fetches_waiting": 5,
    }  # fmt: skip


def frame(width: int, height: int | None, *, waiting: bool = False, **counts: int) -> list[str]:
    """The lines of it, without colours."""
    draw = np.random.default_rng(0)
    heat = HeatMap(tuple(range(48)), draw.random((48, 128)), draw.random((48, 128)) > 0.5)
    view = View(SOCKET)
    for uptime in (3600.0, 3601.0):
        view.take(Sample(stats(uptime, **counts), "qwen3-30b-a3b-0", heat), 1e12)
    if waiting:
        view.wait()
    console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
    console.print(view.frame(width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


SIZES = [(width, height) for width in (40, 60, 80, 100, 200) for height in (8, 12, 24, 50, None)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_it_fits_and_figures_are_whole(width: int, height: int | None) -> None:
    lines = frame(width, height)
    assert max(map(len, lines)) <= width
    assert height is None or len(lines) <= height
    cut = [line for line in lines if "…" in line]
    assert all(line.startswith("expertd at …") for line in cut), "only the path's beginning"
    text = "\n".join(lines)
    for figure in ("up 1:00:01", "1 warning: expertd stats", "20.0 GiB of 24.0 GiB", "99.0 %",
                   "16.0 GiB of 32.0 GiB in RAM", "qwen3-30b-a3b-0", "3072/6144"):  # fmt: skip
        assert figure in text
    if height is None or height >= 24:
        for figure in ("1.0 GiB of it retired", "23.0 GiB locked", "22.0 GiB in huge pages",
                       "5.0 GiB/s read", "queued 12 reads, 34 hints", "5 fetches wait",
                       "epoch lag", "102", "wanted"):  # fmt: skip
            assert figure in text


def test_80_columns_have_what_tells_of_trouble() -> None:
    lines = frame(80, 24)
    for columns in (
        ("model", "resident", "hits", "uses/s", "NVMe/s", "evicted/s", "fetch"),
        ("session", "pid", "uid", "model", "hits", "uses/s", "epoch lag"),
    ):
        assert any(all(name in line for name in columns) for line in lines), columns
    assert any("in RAM, cold" in line and line.endswith("wanted") for line in lines)


def test_what_is_left_out_is_counted() -> None:
    lines = frame(80, 24, num_models=12, num_sessions=30)
    counted = [line.strip() for line in lines if line.startswith("and ")]
    models, sessions = (int(line.split()[1]) for line in counted)
    assert models + sum("/6144" in line for line in lines) == 12
    assert sessions + sum(" 1234567 " in line for line in lines) == 30


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_that_no_daemon_answers_is_never_cut(width: int) -> None:
    text = "\n".join(frame(width, 24, waiting=True))
    assert "waiting for expertd" in text
    view = View(SOCKET)
    view.wait()
    console = Console(width=width, file=io.StringIO())
    console.print(view.frame(width, 24))
    assert isinstance(console.file, io.StringIO)
    assert "waiting for expertd at" in console.file.getvalue()

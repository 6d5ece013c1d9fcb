"""What happened between two stats of one daemon, per second."""

from typing import Any

Stats = dict[str, Any]


def rates(before: Stats | None, now: Stats) -> dict[str, Any]:
    """Rates of models (by name) and sessions (by id) that are in both stats.

    Empty if there is nothing to compare: no ``before``, or one of another incarnation.
    ``hit_rate`` and ``fetch_seconds`` (the mean) are null where nothing was accessed or fetched.
    """
    empty: dict[str, Any] = {"interval_seconds": 0.0, "models": {}, "sessions": {}}
    if before is None or before["incarnation"] != now["incarnation"]:
        return empty
    seconds = now["uptime_seconds"] - before["uptime_seconds"]
    if seconds <= 0:
        return empty
    models, sessions = {}, {}
    for old, new in _pairs(before["models"], now["models"], "name"):
        if new["nvme_misses"] < old["nvme_misses"] or new["evictions"] < old["evictions"]:
            continue  # unloaded and loaded again in between
        fetches = new["fetches"] - old["fetches"]
        waited = new["fetch_seconds"] - old["fetch_seconds"]
        models[new["name"]] = {
            **_accesses(old, new, seconds),
            "nvme_bytes_per_second": (new["nvme_bytes_read"] - old["nvme_bytes_read"]) / seconds,
            "evictions_per_second": (new["evictions"] - old["evictions"]) / seconds,
            "fetches_per_second": fetches / seconds,
            "fetch_seconds": waited / fetches if fetches > 0 else None,
            "rows": _accesses(_rows(old), _rows(new), seconds),
        }
    for old, new in _pairs(before["sessions"], now["sessions"], "id"):
        sessions[new["id"]] = _accesses(old, new, seconds)
    return {"interval_seconds": seconds, "models": models, "sessions": sessions}


def hit_rate(hits: int, misses: int) -> float | None:
    """The share of hits; None if there was no access."""
    # Hits may fall by a few when their misses are told late.
    return max(0, hits) / (max(0, hits) + misses) if hits + misses > 0 else None


def _accesses(old: Stats, new: Stats, seconds: float) -> dict[str, float | None]:
    hits = new["host_hits"] - old["host_hits"]
    misses = new["nvme_misses"] - old["nvme_misses"]
    return {
        "hit_rate": hit_rate(hits, misses),
        "accesses_per_second": max(0, hits + misses) / seconds,
    }


def _rows(model: Stats) -> Stats:
    """Accesses to rows of all tables."""
    tables = model.get("tables", [])
    return {
        "host_hits": sum(table["hits"] for table in tables),
        "nvme_misses": sum(table["misses"] for table in tables),
    }


def _pairs(before: list[Stats], now: list[Stats], key: str) -> list[tuple[Stats, Stats]]:
    known = {each[key]: each for each in before}
    return [(known[each[key]], each) for each in now if each[key] in known]

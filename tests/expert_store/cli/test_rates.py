from typing import Any

from expertd.cli.rates import hit_rate, rates


def stats(uptime: float, model: dict[str, Any], incarnation: str = "a") -> dict[str, Any]:
    row = {
        "name": "m", "host_hits": 0, "nvme_misses": 0, "nvme_bytes_read": 0, "evictions": 0,
        "fetches": 0, "fetch_seconds": 0.0, **model,
    }  # fmt: skip
    session = {"id": 1, "host_hits": row["host_hits"], "nvme_misses": row["nvme_misses"]}
    return {
        "incarnation": incarnation,
        "uptime_seconds": uptime,
        "models": [row],
        "sessions": [session],
    }


def test_what_happened_per_second() -> None:
    before = stats(10, {"host_hits": 5, "nvme_misses": 5, "fetches": 1, "fetch_seconds": 1.0})
    now = stats(
        12,
        {"host_hits": 11, "nvme_misses": 7, "nvme_bytes_read": 800, "evictions": 3,
         "fetches": 3, "fetch_seconds": 1.5, "tables": [{"hits": 9, "misses": 1}]},
    )  # fmt: skip
    told = rates(before, now)
    assert told["interval_seconds"] == 2
    assert told["models"]["m"] == {
        "hit_rate": 0.75,
        "accesses_per_second": 4.0,
        "nvme_bytes_per_second": 400.0,
        "evictions_per_second": 1.5,
        "fetches_per_second": 1.0,
        "fetch_seconds": 0.25,
        "rows": {"hit_rate": 0.9, "accesses_per_second": 5.0},
    }
    assert told["sessions"] == {1: {"hit_rate": 0.75, "accesses_per_second": 4.0}}


def test_nothing_to_compare() -> None:
    empty = {"interval_seconds": 0.0, "models": {}, "sessions": {}}
    now = stats(5, {"host_hits": 3})
    assert rates(None, now) == empty
    assert rates(stats(3, {}, incarnation="b"), now) == empty, "another daemon"
    assert rates(now, now) == empty


def test_a_model_that_was_loaded_again_has_no_rates_yet() -> None:
    told = rates(stats(1, {"nvme_misses": 9, "evictions": 9}), stats(2, {"nvme_misses": 1}))
    assert told["models"] == {}


def test_hits_that_were_told_too_early() -> None:
    told = rates(stats(1, {"host_hits": 3}), stats(2, {"host_hits": 1, "nvme_misses": 2}))
    assert told["models"]["m"]["hit_rate"] is None or told["models"]["m"]["hit_rate"] == 0.0
    assert hit_rate(0, 0) is None
    assert hit_rate(-1, 3) == 0.0

"""What the metrics say of a store, and that they say it as Prometheus wants it."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from expertd.disk.trial import Trial
from expertd.serving.stats import collect_stats
from expertd.settings.disk_io import DiskIo
from expertd.sight.metrics import StoreMetrics
from expertd.sight.metrics_server import Families
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertstore.errors import RecordLostError
from expertstore.status import CODE_NAMES
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.in_memory import Worker, disk, storing, until
from tests.promtool import check, needs_promtool

RECORD = 2 * PAGE
DOCS = Path(__file__).parents[3] / "docs/monitoring.md"
HITS = ("expertd_accesses_total",)
LABELS = {
    "code": set(CODE_NAMES),
    "door": {"attach", "rpc", "tcp"},
    "level": {"host_hit", "nvme_miss"},
    "model": {"", "m", "n"},
    "priority": {"demand", "hint"},
    "role": {"worker", "reader", "admin"},
    "state": {"used", "free", "rows"},
    "way": {"direct", "mmap"},
}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """Room for eight records of 24; "n" is beside it, unused."""
    packs = {"m": make_pack(tmp_path / "m"), "n": make_pack(tmp_path / "n", layers=1, seed=1)}
    async with storing(packs, 8 * RECORD) as store:
        yield store


def text(store: Store, metrics: StoreMetrics | None = None) -> str:
    return generate_latest(Families((metrics or StoreMetrics(store)).collect())).decode()


def value(exposition: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    raise AssertionError(f"no {name}{labels} in\n{exposition}")


async def test_accesses_bytes_and_evictions(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch_and_release(*range(8))
    worker.page.touch([*range(8), 0, 1], set(range(2, 8)))
    await worker.fetch_and_release(8)
    now = text(store)
    assert value(now, "expertd_accesses_total", model="m", level="host_hit") == 4
    assert value(now, "expertd_accesses_total", model="m", level="nvme_miss") == 6
    assert value(now, "expertd_accesses_total", model="n", level="host_hit") == 0
    assert value(now, "expertd_read_bytes_total", model="m") == 9 * RECORD
    assert value(now, "expertd_evictions_total", model="m") == 1
    assert value(now, "expertd_resident_experts", model="m") == 8
    assert value(now, "expertd_resident_bytes", model="m") == 8 * RECORD
    assert value(now, "expertd_model_experts", model="m") == 24
    assert value(now, "expertd_model_bytes", model="m") == 24 * RECORD
    assert value(now, "expertd_model_working_set_bytes", model="m") == 6 * RECORD
    assert value(now, "expertd_arena_bytes", state="used") == 8 * RECORD
    assert value(now, "expertd_arena_bytes", state="free") == 0
    assert value(now, "expertd_fetch_seconds_count", model="m") == 2
    assert value(now, "expertd_record_read_seconds_count", model="m") == 9
    assert value(now, "expertd_record_read_seconds_sum", model="m") > 0
    assert value(now, "expertd_fetches_waiting") == 0


async def test_who_is_attached_and_how_far_behind(store: Store) -> None:
    workers = [Worker(store), Worker(store), Worker(store, "n")]
    now = text(store)
    assert value(now, "expertd_sessions", role="worker", model="m") == 2
    assert value(now, "expertd_sessions", role="worker", model="n") == 1
    assert value(now, "expertd_sessions", role="admin", model="") == 0
    await workers[0].fetch_and_release(*range(8))
    workers[1].holding = True
    store.models["m"].evict([0])
    workers[0].publish()
    now = text(store)
    assert value(now, "expertd_epoch_lag_max", model="m") == 1
    assert value(now, "expertd_epoch_acknowledged", model="m") == 1
    assert value(now, "expertd_arena_retired_bytes") == RECORD
    workers[1].publish()
    now = text(store)
    assert value(now, "expertd_epoch_lag_max", model="m") == 0
    assert value(now, "expertd_epoch_acknowledged", model="m") == 2
    assert value(now, "expertd_arena_retired_bytes") == 0


async def test_what_waits(store: Store) -> None:
    worker = Worker(store)
    faults = disk(worker.model).faults
    faults.gate.clear()
    try:
        fetching = asyncio.create_task(worker.fetch(*range(0, 12, 2)))  # no neighbours
        await until(lambda: len(worker.model.loads) == 6)
        await until(lambda: store.loader.num_urgent == 4)  # of two threads
        store.records.prefetch(worker.session, [13, 15], 0)
        await until(lambda: store.loader.num_hinted == 2)
        now = text(store)
        assert value(now, "expertd_fetches_waiting") == 1
        assert value(now, "expertd_loading_experts", model="m") == 8
        assert value(now, "expertd_loader_queued_reads", priority="demand") == 4
        assert value(now, "expertd_loader_queued_reads", priority="hint") == 2
        assert value(now, "expertd_prefetch_issued_total", model="m") == 2
        store.records.drop_hint(worker.session)
        now = text(store)
        assert value(now, "expertd_prefetch_issued_total", model="m") == 2, "a counter only grows"
        assert value(now, "expertd_prefetch_withdrawn_total", model="m") == 2
    finally:
        faults.gate.set()
    await fetching


async def test_pins_losses_and_cut_offs(store: Store) -> None:
    await store.unload_model("n")  # pins need room beside the working sets
    workers = Worker(store), Worker(store)
    for worker in workers:
        await store.records.pin(worker.session, [3])
    disk(workers[0].model).faults.flipped.add(PAGE + 5 * RECORD + 7)
    with pytest.raises(RecordLostError):
        await workers[0].fetch(5)
    store._cut_off(workers[1].session)
    now = text(store)
    assert value(now, "expertd_pinned_bytes", model="m") == RECORD
    assert value(now, "expertd_records_lost_total", model="m") == 1
    assert value(now, "expertd_cut_offs_total") == 1
    extent = workers[0].model.extent(3)
    assert extent is not None
    store.arena.memory.view[extent.offset] ^= 1
    await store.records.read(workers[0].model, 3)
    assert value(text(store), "expertd_records_damaged_total", model="m") == 1


async def test_hits_do_not_fall_when_their_misses_are_seen_late(store: Store) -> None:
    """A fall would look like a restart, and count everything once more."""
    worker, metrics = Worker(store), StoreMetrics(store)
    worker.page.touch([1, 2, 3])
    assert value(text(store, metrics), *HITS, model="m", level="host_hit") == 3
    worker.page._words[5] = 2  # the misses of what was just counted
    now = text(store, metrics)
    assert worker.model.counters.host_hits == 1
    assert value(now, *HITS, model="m", level="host_hit") == 3
    assert value(now, *HITS, model="m", level="nvme_miss") == 2
    worker.page.touch([1] * 4)
    assert value(text(store, metrics), *HITS, model="m", level="host_hit") == 5


async def test_a_model_that_is_unloaded_is_gone(store: Store) -> None:
    await store.unload_model("n")
    assert 'model="n"' not in text(store)


async def test_labels_are_few_and_bounded(store: Store) -> None:
    worker = Worker(store)
    await worker.fetch(*range(8))
    for family in text_string_to_metric_families(text(store)):
        for sample in family.samples:
            for label, given in sample.labels.items():
                if label not in {"le", "version"}:
                    assert given in LABELS[label], (sample.name, label)


@needs_promtool
async def test_promtool_finds_no_fault(store: Store) -> None:
    assert check("check", "metrics", text=text(store)) == ""


async def test_how_records_are_read(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "m")
    async with storing(
        {"m": pack}, 8 * RECORD, disk_io=DiskIo.MMAP, page_cache_bytes=4 * RECORD
    ) as store:
        await Worker(store).fetch(*range(3))
        store.models["m"].disk = replace(store.models["m"].disk, trial=Trial(2e9, 3e9))
        now = text(store)
        assert value(now, "expertd_reads_mapped", model="m") == 1
        assert value(now, "expertd_page_cache_bytes", model="m") == 3 * RECORD
        assert value(now, "expertd_page_cache_max_bytes") == 4 * RECORD
        tried = "expertd_disk_trial_bytes_per_second"
        assert value(now, tried, model="m", way="direct") == 2e9
        assert value(now, tried, model="m", way="mmap") == 3e9
        told = collect_stats(store)
        assert (told.page_cache, told.page_cache_max) == (3 * RECORD, 4 * RECORD)
        assert told.models[0].disk == pb.DiskStats(
            asked="mmap",
            way="mmap",
            direct_bytes_per_second=2e9,
            mmap_bytes_per_second=3e9,
            page_cache=3 * RECORD,
        )


async def test_all_are_documented(store: Store) -> None:
    rows = dict(re.findall(r"(?m)^\| `(expertd_\w+)` \| ([^|]*) \|", DOCS.read_text()))
    exported = {}
    for family in StoreMetrics(store).collect():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = family.name + ("_total" if family.type == "counter" else "")
        exported[name] = ", ".join([family.type, *(f"`{label}`" for label in sorted(labels))])
    assert rows == exported

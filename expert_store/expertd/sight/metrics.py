"""What Prometheus is told: the store's state as metric families.

Nothing is counted here: each value is read where the daemon keeps it anyway, when somebody
asks. Labels are few and bounded: a model's name, a role, a level, a status code, never an
expert or a session. docs/monitoring.md lists all names.
"""

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from expertd.histogram import BOUNDS_SECONDS, Histogram
from expertd.hosting.hosted_model import HostedModel
from expertd.hosting.hosted_session import HostedSession
from expertd.settings.disk_io import DiskIo
from expertd.store import Store
from expertstore import __version__
from expertstore.shared.handshake import Role
from expertstore.status import CODE_NAMES

DOORS = ("attach", "rpc", "tcp")
_LES = [*map(str, BOUNDS_SECONDS), "+Inf"]


class StoreMetrics:
    """The metrics of one store. :meth:`collect` belongs on the store's event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hits: WeakKeyDictionary[HostedModel, int] = WeakKeyDictionary()

    def collect(self) -> list[Metric]:
        """All of them, after taking in what the workers have written."""
        self._store.slots.refresh()
        return [
            *self._daemon(),
            *self._arena(),
            *self._page_cache(),
            *self._models(),
            *self._tables(),
            *self._sessions(),
            *self._queues(),
        ]

    def _daemon(self) -> Iterator[Metric]:
        store = self._store
        yield _gauge("expertd_build_info", "The version that runs; always 1.", version=__version__)
        yield _gauge(
            "expertd_start_time_seconds",
            "When this incarnation of the daemon began, in seconds since the epoch.",
            store.started_time,
        )
        yield _gauge(
            "expertd_warnings",
            "What runs in a degraded way; `expertd stats` has a sentence for each.",
            len(store.warnings),
        )
        lag = HistogramMetricFamily(
            "expertd_event_loop_lag_seconds",
            "How much later than it was due the event loop ran the daemon's pulse.",
        )
        _add(lag, [], store.loop_lag)
        yield lag
        refusals = CounterMetricFamily(
            "expertd_refusals",
            "Calls and attachments answered with an error, by the status code.",
            labels=["door", "code"],
        )
        for door in DOORS:
            for code in CODE_NAMES:  # those at 0 too: an increase needs a beginning
                refusals.add_metric([door, code], store.refusals[door, code])
        yield refusals
        yield CounterMetricFamily(
            "expertd_cut_offs",
            "Sessions ended because they stood still while others waited.",
            value=store.num_cut_off,
        )

    def _page_cache(self) -> Iterator[Metric]:
        yield _gauge(
            "expertd_page_cache_max_bytes",
            "Of what mapped reads leave in the page cache, the most that is kept.",
            self._store.page_cache.max_bytes,
        )

    def _arena(self) -> Iterator[Metric]:
        store, extents = self._store, self._store.slots.extents
        arena = GaugeMetricFamily(
            "expertd_arena_bytes",
            "The RAM budget: used by records, also those evicted or arriving, free, and for rows.",
            labels=["state"],
        )
        arena.add_metric(["used"], extents.bytes_used)
        arena.add_metric(["free"], extents.bytes_total - extents.bytes_used)
        arena.add_metric(["rows"], store.tables.num_bytes)
        yield arena
        yield _gauge(
            "expertd_arena_retired_bytes",
            "Evicted records whose bytes wait for their last reader to move on.",
            sum(model.reclaimer.bytes_retired for model in store.models.values()),
        )
        yield _gauge(
            "expertd_arena_lock_wanted_bytes",
            "What is to be locked in RAM: the arena, or 0 with lock_memory = false.",
            store.arena.num_bytes if store.config.lock_memory else 0,
        )
        yield _gauge(
            "expertd_arena_locked_bytes", "Of it, locked in RAM.", store.arena.locked_bytes
        )
        yield _gauge(
            "expertd_arena_huge_page_bytes",
            "Of the arena, in huge pages.",
            store.arena.huge_page_bytes,
        )

    def _models(self) -> Iterator[Metric]:
        gauges: list[tuple[str, str, Callable[[HostedModel], float]]] = [
            ("expertd_model_experts", "The model's experts.", lambda m: m.num_entries),
            ("expertd_model_bytes", "Size of all its records.", lambda m: m.manifest.expert_bytes),
            (
                "expertd_model_working_set_bytes",
                "What one token uses: less budget than that, and nothing can be hit.",
                lambda m: m.manifest.working_set_bytes,
            ),
            ("expertd_resident_experts", "Records in RAM now.", lambda m: m.num_resident),
            ("expertd_resident_bytes", "Size of those.", lambda m: m.resident_bytes),
            ("expertd_pinned_bytes", "Records that sessions have pinned.", self._pinned_bytes),
            ("expertd_loading_experts", "Records being read.", lambda m: len(m.loads)),
            (
                "expertd_reads_mapped",
                "1 if its records are read by mmap, 0 if direct.",
                lambda m: m.disk.way is DiskIo.MMAP,
            ),
            (
                "expertd_page_cache_bytes",
                "What reads by mmap have left in the page cache, at most.",
                lambda m: self._store.page_cache.bytes_of(m.files),
            ),
            (
                "expertd_epoch_lag_max",
                "Evictions that the model's slowest session has yet to acknowledge.",
                lambda m: max((each.epoch_lag for each in self._workers(m)), default=0),
            ),
            (
                "expertd_epoch_acknowledged",
                "The epoch that all of the model's sessions have acknowledged.",
                lambda m: min(
                    (each.page.epoch for each in self._workers(m)), default=m.directory.epoch
                ),
            ),
        ]
        counters: list[tuple[str, str, Callable[[HostedModel], float]]] = [
            (
                "expertd_read_bytes",
                "Read from the pack, for demand and hints.",
                lambda m: m.counters.nvme_bytes_read,
            ),
            (
                "expertd_evictions",
                "Records withdrawn to make room.",
                lambda m: m.counters.evictions,
            ),
            (
                "expertd_records_moved",
                "Resident records moved to make room in one piece.",
                lambda m: m.counters.moves,
            ),
            (
                "expertd_records_in_pack",
                "Fetched records that workers were sent to the pack for, as no slot was to be had.",
                lambda m: m.counters.records_in_pack,
            ),
            (
                "expertd_records_adopted",
                "Records taken over, verified, from the daemon before this one.",
                lambda m: m.counters.adopted_records,
            ),
            (
                "expertd_records_dropped",
                "Records that the daemon before left, but that failed verification.",
                lambda m: m.counters.dropped_records,
            ),
            (
                "expertd_prefetch_issued",
                "Reads queued by hints.",
                lambda m: m.counters.prefetch_queued,
            ),
            (
                "expertd_prefetch_withdrawn",
                "Of these, taken back before they began.",
                lambda m: m.counters.prefetch_withdrawn,
            ),
            (
                "expertd_prefetch_useful",
                "Of these, used when resident.",
                lambda m: m.counters.prefetch_useful,
            ),
            (
                "expertd_prefetch_late",
                "Of these, asked for while they were still being read.",
                lambda m: m.counters.prefetch_late,
            ),
            (
                "expertd_prefetch_wasted",
                "Of these, evicted without use.",
                lambda m: m.counters.prefetch_wasted,
            ),
            (
                "expertd_records_lost",
                "Reads that failed or did not match their checksum.",
                lambda m: m.counters.records_lost,
            ),
            (
                "expertd_records_damaged",
                "Records found damaged in RAM, and dropped.",
                lambda m: m.counters.records_damaged,
            ),
        ]
        histograms: list[tuple[str, str, Callable[[HostedModel], Histogram]]] = [
            (
                "expertd_fetch_seconds",
                "A fetch, from request to grant.",
                lambda m: m.counters.fetch_seconds,
            ),
            (
                "expertd_record_read_seconds",
                "Reading and verifying one record.",
                lambda m: m.counters.read_seconds,
            ),
        ]
        models = self._store.models.values()
        accesses = CounterMetricFamily(
            "expertd_accesses",
            "Accesses of all workers to experts: found in RAM, or had to wait for NVMe.",
            labels=["model", "level"],
        )
        for model in models:
            # A counter must not fall; this one may by a few (see Counters).
            hits = max(self._hits.get(model, 0), model.counters.host_hits)
            self._hits[model] = hits
            accesses.add_metric([model.name, "host_hit"], hits)
            accesses.add_metric([model.name, "nvme_miss"], model.counters.nvme_misses)
        yield accesses
        tried = GaugeMetricFamily(
            "expertd_disk_trial_bytes_per_second",
            "What either way of reading gave when the model was loaded; 0 if it was not tried.",
            labels=["model", "way"],
        )
        for model in models:
            tried.add_metric([model.name, DiskIo.DIRECT.value], model.disk.trial.direct)
            tried.add_metric([model.name, DiskIo.MMAP.value], model.disk.trial.mapped)
        yield tried
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model in models:
                gauge.add_metric([model.name], value(model))
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model in models:
                counter.add_metric([model.name], value(model))
            yield counter
        for name, text, observed in histograms:
            histogram = HistogramMetricFamily(name, text, labels=["model"])
            for model in models:
                _add(histogram, [model.name], observed(model))
            yield histogram

    def _tables(self) -> Iterator[Metric]:
        """Of the tables of each model together."""
        accesses = CounterMetricFamily(
            "expertd_row_accesses",
            "Rows of tables that workers used: found in RAM, or had to wait for NVMe.",
            labels=["model", "level"],
        )
        read = CounterMetricFamily(
            "expertd_row_read_bytes", "Read from tables' files, also for hints.", labels=["model"]
        )
        lost = CounterMetricFamily(
            "expertd_rows_lost", "Rows that could not be read or verified.", labels=["model"]
        )
        resident = GaugeMetricFamily(
            "expertd_rows_resident_bytes", "Rows of tables in RAM.", labels=["model"]
        )
        for model in self._store.models.values():
            tables = model.tables
            counters = [table.counters for table in tables]
            accesses.add_metric([model.name, "host_hit"], sum(each.hits for each in counters))
            accesses.add_metric([model.name, "nvme_miss"], sum(each.misses for each in counters))
            read.add_metric([model.name], sum(each.nvme_bytes_read for each in counters))
            lost.add_metric([model.name], sum(each.rows_lost for each in counters))
            in_ram = (table.slots.num_resident * table.table.row_bytes for table in tables)
            resident.add_metric([model.name], sum(in_ram))
        yield from (accesses, read, lost, resident)

    def _sessions(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "expertd_sessions",
            "Attached sessions; model is empty unless the role is worker.",
            labels=["role", "model"],
        )
        sessions = self._store.sessions.values()
        for model in self._store.models.values():
            family.add_metric([Role.WORKER.value, model.name], len(self._workers(model)))
        for role in Role:
            if role is not Role.WORKER:
                count = sum(session.role is role for session in sessions)
                family.add_metric([role.value, ""], count)
        yield family

    def _queues(self) -> Iterator[Metric]:
        loader = self._store.loader
        queued = GaugeMetricFamily(
            "expertd_loader_queued_reads",
            "Records to be read that no loader thread has begun.",
            labels=["priority"],
        )
        queued.add_metric(["demand"], loader.num_urgent)
        queued.add_metric(["hint"], loader.num_hinted)
        yield queued
        yield _gauge(
            "expertd_fetches_waiting",
            "Fetches that are not yet granted.",
            sum(session.fetches_in_flight for session in self._store.sessions.values()),
        )

    def _workers(self, model: HostedModel) -> list[HostedSession]:
        return [
            session
            for session in self._store.sessions.values()
            if session.is_worker and session.model is model
        ]

    def _pinned_bytes(self, model: HostedModel) -> int:
        pinned = {entry for session in self._workers(model) for entry in session.pins}
        return sum(map(model.record_bytes, pinned))


def _gauge(name: str, text: str, value: float = 1, **labels: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _add(family: HistogramMetricFamily, labels: list[str], observed: Histogram) -> None:
    buckets = list(zip(_LES, observed.cumulative(), strict=True))
    family.add_metric(labels, buckets, observed.sum_seconds)

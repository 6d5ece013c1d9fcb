"""What the daemon reports: numbers out of its state, and the same as plain values."""

import time
from collections.abc import Mapping

import numpy as np

from expertd.hosting.hosted_model import HostedModel
from expertd.hosting.hosted_session import HostedSession
from expertd.hosting.peers import Peer
from expertd.hosting.quotas import Quotas
from expertd.store import Store
from expertd.tables.hosted_table import HostedTable
from expertstore.v1 import expert_store_pb2 as pb


def collect_stats(store: Store) -> pb.Stats:
    """The store's state now, after taking in what the workers have written."""
    store.slots.refresh()
    extents = store.slots.extents
    uids = {session.uid for session in store.sessions.values()}
    kept = {uid: store.quotas.kept_by(uid).all.num_bytes for uid in uids}
    return pb.Stats(
        incarnation=store.incarnation,
        uptime_seconds=time.monotonic() - store.started_at,
        arena=pb.ArenaStats(
            bytes_total=extents.bytes_total,
            bytes_used=extents.bytes_used,
            locked=store.arena.locked_bytes,
            huge_pages=store.arena.huge_page_bytes,
            table_bytes=store.tables.num_bytes,
            retired=sum(model.reclaimer.bytes_retired for model in store.models.values()),
        ),
        models=[_model_stats(store, model) for model in store.models.values()],
        sessions=[_session_stats(each, store.quotas, kept) for each in store.sessions.values()],
        warnings=store.warnings,
        policy=store.config.policy,
        peers=[_peer_stats(peer) for peer in store.peers],
        adoptions=store.arena.trailer.adoptions,
        fetches_waiting=sum(session.fetches_in_flight for session in store.sessions.values()),
        queued_reads=store.loader.num_urgent,
        queued_hints=store.loader.num_hinted,
        cut_offs=store.num_cut_off,
        page_cache=store.page_cache.num_bytes,
        page_cache_max=store.page_cache.max_bytes,
    )


def collect_heat(model: HostedModel) -> pb.GetHeatResponse:
    """How hot the model's experts are, and which are resident."""
    heat = np.maximum(model.heat.of(np.arange(model.num_entries)), 0)
    max_heat = float(heat.max())
    scale = max_heat if max_heat > 0 else 1.0
    return pb.GetHeatResponse(
        layers=[
            pb.HeatLayer(layer=layer.layer, num_experts=layer.num_experts)
            for layer in model.manifest.layers
        ],
        heat=np.ceil(255 * np.sqrt(heat / scale)).astype(np.uint8).tobytes(),
        max_heat=max_heat,
        resident=np.packbits(model.resident_mask, bitorder="little").tobytes(),
    )


def _model_stats(store: Store, model: HostedModel) -> pb.ModelStats:
    counters = model.counters
    return pb.ModelStats(
        name=model.name,
        num_experts=model.num_entries,
        num_resident=model.num_resident,
        record_bytes=model.max_record_bytes,
        host_hits=counters.host_hits,
        nvme_misses=counters.nvme_misses,
        nvme_bytes_read=counters.nvme_bytes_read,
        evictions=counters.evictions,
        prefetch=pb.PrefetchStats(
            issued=counters.prefetch_issued,
            useful=counters.prefetch_useful,
            late=counters.prefetch_late,
            wasted=counters.prefetch_wasted,
        ),
        records_lost=counters.records_lost,
        resident_bytes=model.resident_bytes,
        expert_bytes=model.manifest.expert_bytes,
        working_set_bytes=model.manifest.working_set_bytes,
        fetches=counters.fetch_seconds.count,
        fetch_seconds=counters.fetch_seconds.sum_seconds,
        adopted_records=counters.adopted_records,
        adopted_bytes=counters.adopted_bytes,
        dropped_records=counters.dropped_records,
        min_bytes=model.limits.min_bytes,
        max_bytes=model.limits.max_bytes or 0,
        num_pinned=len(model.pinned),
        num_pinned_resident=sum(map(model.is_resident, model.pinned)),
        moves=counters.moves,
        records_in_pack=counters.records_in_pack,
        tables=[_table_stats(table) for table in model.tables],
        disk=pb.DiskStats(
            asked=model.disk.asked,
            way=model.disk.way,
            past_page_cache=model.disk.past_page_cache,
            direct_bytes_per_second=model.disk.trial.direct,
            mmap_bytes_per_second=model.disk.trial.mapped,
            page_cache=store.page_cache.bytes_of(model.files),
        ),
    )


def _table_stats(hosted: HostedTable) -> pb.TableStats:
    counters, table = hosted.counters, hosted.table
    return pb.TableStats(
        name=table.name,
        num_rows=table.num_rows,
        row_bytes=table.row_bytes,
        table_bytes=table.num_bytes,
        cache_bytes=hosted.slots.places.num_bytes,
        num_resident=hosted.slots.num_resident,
        hits=counters.hits,
        misses=counters.misses,
        evictions=hosted.slots.num_evicted,
        nvme_bytes_read=counters.nvme_bytes_read,
        prefetched=counters.prefetched,
        rows_lost=counters.rows_lost,
        fetches=counters.fetch_seconds.count,
        fetch_seconds=counters.fetch_seconds.sum_seconds,
    )


def _session_stats(
    session: HostedSession, quotas: Quotas, kept_bytes: Mapping[int, int]
) -> pb.SessionStats:
    return pb.SessionStats(
        id=session.id,
        pid=session.pid,
        uid=session.uid,
        model=session.model_name,
        attached_seconds=time.monotonic() - session.attached_at,
        epoch_lag=session.epoch_lag,
        kept_bytes=session.kept_bytes,
        quota_bytes=quotas.of(session.uid) or 0,
        uid_kept_bytes=kept_bytes[session.uid],
        role=session.role,
        bytes_read=session.bytes_read,
        host_hits=session.host_hits,
        nvme_misses=session.nvme_misses,
        records_in_pack=session.records_in_pack,
    )


def _peer_stats(peer: Peer) -> pb.PeerStats:
    return pb.PeerStats(
        name=peer.name,
        num_reads=peer.num_reads,
        bytes_read=peer.bytes_read,
        idle_seconds=time.monotonic() - peer.last_call,
    )

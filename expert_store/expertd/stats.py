"""What the daemon reports: numbers out of its state, and the same as plain values."""

import time

from expertd.hosted_model import HostedModel
from expertd.peers import Peer
from expertd.session import Session
from expertd.store import Store
from expertstore.v1 import expert_store_pb2 as pb


def collect_stats(store: Store) -> pb.Stats:
    """The store's state now, after taking in what the workers have written."""
    store.slots.refresh()
    extents = store.slots.extents
    return pb.Stats(
        incarnation=store.incarnation,
        uptime_seconds=time.monotonic() - store.started_at,
        arena=pb.ArenaStats(
            bytes_total=extents.bytes_total,
            bytes_used=extents.bytes_used,
            locked=store.arena.locked_bytes,
            huge_pages=store.arena.huge_page_bytes,
        ),
        models=[_model_stats(model) for model in store.models.values()],
        sessions=[_session_stats(session) for session in store.sessions.values()],
        warnings=store.warnings,
        policy=store.config.policy,
        peers=[_peer_stats(peer) for peer in store.peers],
    )


def _model_stats(model: HostedModel) -> pb.ModelStats:
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
    )


def _session_stats(session: Session) -> pb.SessionStats:
    return pb.SessionStats(
        id=session.id,
        pid=session.pid,
        uid=session.uid,
        model=session.model_name,
        attached_seconds=time.monotonic() - session.attached_at,
        epoch_lag=session.epoch_lag,
        role=session.role,
        bytes_read=session.bytes_read,
    )


def _peer_stats(peer: Peer) -> pb.PeerStats:
    return pb.PeerStats(
        name=peer.name,
        num_reads=peer.num_reads,
        bytes_read=peer.bytes_read,
        idle_seconds=time.monotonic() - peer.last_call,
    )

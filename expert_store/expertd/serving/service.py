"""The gRPC service: requests into calls of the store, results into messages."""

from __future__ import annotations  # grpc.aio's types take parameters only in the stubs

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expertd.hosting.hosted_model import HostedModel
from expertd.hosting.hosted_session import HostedSession
from expertd.hosting.peers import Peer
from expertd.hosting.read_ahead import read_ahead
from expertd.hosting.touch_watch import MAX_WATCHERS, TouchWatch
from expertd.serving.messages import model_response, model_summary, pack_place
from expertd.serving.stats import collect_heat, collect_stats
from expertd.settings.disk_io import parse_disk_io
from expertd.settings.limits import ModelLimits
from expertd.store import Store
from expertd.tables.row_slots import Rows
from expertstore.errors import (
    ExpertdError,
    IncarnationError,
    InvalidInputError,
    PermissionDeniedError,
    PreconditionError,
    UnavailableError,
)
from expertstore.shared.handshake import INCARNATION_KEY, TOKEN_KEY, Role
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_CHUNK_BYTES = 1 << 20
_MIN_INTERVAL_SECONDS = 0.05
_MAX_WAIT_SECONDS = 0.5


class ExpertStoreService(rpc.ExpertStoreServicer):
    """``expertstore.v1.ExpertStore`` over a :class:`~expertd.store.Store`.

    Exceptions leave through :class:`~expertd.serving.edge.Edge`.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[model_summary(model) for model in self._store.models.values()],
            incarnation=self._store.incarnation,
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        # A worker's first call, by which it says that it will read; anybody else may ask too.
        with suppress(ExpertdError):
            self._session(context)
        model = self._store.model(request.name)
        return model_response(
            model, self._store.budget.max_fetch_records(model), self._store.incarnation
        )

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        self._admin(context)
        if not Path(request.pack_path).is_absolute():
            raise InvalidInputError(
                f"{request.pack_path!r} is not an absolute path; the daemon has another directory."
            )
        limits = ModelLimits(request.min_bytes, request.max_bytes or None, tuple(request.pins))
        disk_io = parse_disk_io(request.disk_io) if request.disk_io else None
        model = await self._store.load_model(
            request.name, Path(request.pack_path), limits=limits, disk_io=disk_io
        )
        return pb.LoadModelResponse(summary=model_summary(model))

    async def SetLimits(
        self, request: pb.SetLimitsRequest, context: Context
    ) -> pb.SetLimitsResponse:
        self._admin(context)
        limits = self._store.model(request.name).limits
        smallest, largest = limits.min_bytes, limits.max_bytes
        if request.HasField("min_bytes"):
            smallest = request.min_bytes
        if request.HasField("max_bytes"):
            largest = request.max_bytes or None
        model = await self._store.set_limits(request.name, smallest, largest)
        return pb.SetLimitsResponse(summary=model_summary(model))

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        self._admin(context)
        return pb.UnloadModelResponse(released_bytes=await self._store.unload_model(request.name))

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> pb.FetchResponse:
        session = self._session(context)
        entries = _entries(session.model, request.experts)
        fetched = await self._store.records.fetch(
            session,
            entries,
            request.fetch_number,
            request.max_in_pack,
            in_waves=request.in_waves,
        )
        return pb.FetchResponse(
            num_missed=fetched.num_missed,
            in_pack=[pack_place(session.model, entry) for entry in fetched.in_pack],
        )

    async def Prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchResponse:
        session = self._session(context)
        entries = _entries(session.model, request.experts)
        accepted = self._store.records.prefetch(session, entries, request.priority)
        return pb.PrefetchResponse(num_accepted=accepted)

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        session = self._session(context)
        entries = _entries(session.model, request.experts)
        return pb.PinResponse(num_pinned=await self._store.records.pin(session, entries))

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        session = self._session(context)
        entries = _entries(session.model, request.experts) or list(session.pins)
        return pb.UnpinResponse(num_unpinned=session.unpin(entries))

    async def Read(
        self, request: pb.ReadRequest, context: Context
    ) -> AsyncIterator[pb.ReadResponse]:
        reader, model = self._reader(request, context)
        if request.fingerprint and request.fingerprint != model.fingerprint:
            raise PreconditionError(
                f"model {model.name!r} is another pack than the one asked for; attach again."
            )
        records = read_ahead(
            _entries(model, request.experts),
            partial(self._store.records.read, model),
            model.record_bytes,
            self._store.read_budget,
        )
        async with aclosing(records):
            async for entry, data in records:
                layer, expert = model.expert(entry)
                for offset in range(0, len(data), _CHUNK_BYTES):
                    yield pb.ReadResponse(
                        expert=pb.ExpertRef(layer=layer, expert=expert),
                        offset=offset,
                        data=data[offset : offset + _CHUNK_BYTES],
                        record_bytes=len(data),
                        checksum=int(model.place(entry).checksum, 16),
                    )
                reader.bytes_read += len(data)
                del data  # the next one has room only once this has gone

    async def FetchRows(
        self, request: pb.FetchRowsRequest, context: Context
    ) -> pb.FetchRowsResponse:
        _, model = self._reader(request, context)
        table = model.table(request.table)
        rows = await table.fetch(_rows(request.rows), _rows(request.used))
        return pb.FetchRowsResponse(data=rows.tobytes())

    async def PrefetchRows(
        self, request: pb.PrefetchRowsRequest, context: Context
    ) -> pb.PrefetchRowsResponse:
        table = self._session(context).model.table(request.table)
        table.use(_rows(request.used))
        return pb.PrefetchRowsResponse(num_accepted=table.prefetch(_rows(request.rows)))

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        return pb.GetStatsResponse(stats=collect_stats(self._store))

    async def WatchStats(
        self, request: pb.WatchStatsRequest, context: Context
    ) -> AsyncIterator[pb.WatchStatsResponse]:
        interval = request.interval_seconds or 1.0
        if not _MIN_INTERVAL_SECONDS <= interval <= 3600:
            raise InvalidInputError(
                f"an interval of {interval:g} s is not possible: give 0.05 to 3600."
            )
        while True:
            yield pb.WatchStatsResponse(stats=collect_stats(self._store))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._store.stopping.wait(), interval)
                raise UnavailableError("expertd is stopping.")

    def _reader(
        self, request: pb.ReadRequest | pb.FetchRowsRequest, context: Context
    ) -> tuple[HostedSession | Peer, HostedModel]:
        """Who reads, and from which model."""
        peer = self._store.peers.of(context)
        if peer is None:
            session = self._session(context)
            model = session.model if session.is_worker else self._store.model(request.model)
            return session, model
        self._check_incarnation(context)
        peer.begin_read()
        # Not when we have sent all: when the other side has taken it, or is gone.
        context.add_done_callback(lambda _: peer.end_read())  # type: ignore[arg-type]
        return peer, self._store.model(request.model)

    def _check_incarnation(self, context: Context) -> None:
        """For those who have no token that would be void after a restart."""
        incarnation = dict(context.invocation_metadata() or ()).get(INCARNATION_KEY)
        if incarnation and incarnation != self._store.incarnation:
            raise IncarnationError(
                "expertd was restarted since this client attached; attach again."
            )

    async def GetHeat(self, request: pb.GetHeatRequest, context: Context) -> pb.GetHeatResponse:
        return collect_heat(self._store.model(request.model))

    async def WatchTouches(
        self, request: pb.WatchTouchesRequest, context: Context
    ) -> AsyncIterator[pb.WatchTouchesResponse]:
        self._admin(context)
        model = self._store.model(request.model)
        if len(model.watches) >= MAX_WATCHERS:
            raise PreconditionError(
                f"{MAX_WATCHERS} watch what {model.name} uses, the most there may be; end one."
            )
        self._store.slots.refresh()  # what was before is not for this watcher
        watch = TouchWatch()
        model.watches.append(watch)
        try:
            await context.send_initial_metadata(())  # says that it has begun
            while True:
                batch = await watch.take(_MAX_WAIT_SECONDS)
                if batch is not None:
                    yield pb.WatchTouchesResponse(
                        session=batch.session,
                        entries=batch.entries.tolist(),
                        num_lost=batch.num_lost,
                        ended=batch.ended,
                    )
                elif watch.closed:
                    return
                if self._store.stopping.is_set():
                    raise UnavailableError("expertd is stopping.")
                self._admin(context)  # its session may have ended
        finally:
            model.watches.remove(watch)

    def _session(self, context: Context) -> HostedSession:
        if self._store.peers.of(context) is not None:
            raise PermissionDeniedError(
                "this needs a session, which only the Unix socket on the daemon's own host gives; "
                "by TCP, Read brings the records."
            )
        metadata = dict(context.invocation_metadata() or ())
        token, incarnation = metadata.get(TOKEN_KEY, ""), metadata.get(INCARNATION_KEY, "")
        return self._store.session(str(token), str(incarnation))

    def _admin(self, context: Context) -> None:
        if self._session(context).role is not Role.ADMIN:
            raise PermissionDeniedError("this needs an admin session: attach with the admin role.")


def _rows(data: bytes) -> Rows:
    if len(data) % 8:
        raise InvalidInputError(f"rows take 8 bytes each, and {len(data)} bytes were sent.")
    return np.frombuffer(data, np.int64)


def _entries(model: HostedModel, experts: Sequence[pb.ExpertRef]) -> list[int]:
    # Counted before any of them is looked at: a list may be as long as a message.
    if len(experts) > model.num_entries:
        raise InvalidInputError(
            f"{len(experts)} experts are listed, but {model.name} has {model.num_entries}."
        )
    return [model.entry(ref.layer, ref.expert) for ref in experts]

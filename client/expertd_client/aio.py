"""The asyncio client: the sync one's calls, awaited.

A lease is the same object as there: holding and releasing cost no call, so there is
nothing in them to await.
"""

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from expertd_client import calls
from expertd_client.address import Address, TlsFiles, UnixAddress, parse_address
from expertd_client.annex import PackPlace
from expertd_client.attaching import attachment_for, credentials_of, greet
from expertd_client.attachment import Attachment
from expertd_client.base_session import MAX_FETCHES, NOT_YET, SESSION_OVER, BaseSession, WaveSize
from expertd_client.copy_attachment import CopyAttachment
from expertd_client.endpoint import MIN_TIMEOUT_SECONDS, Metadata, retry_delays
from expertd_client.lease import Lease
from expertd_client.mapping import Mapping
from expertd_client.model import ModelInfo, ModelSummary
from expertd_client.record import Record, RecordAssembler
from expertd_client.record_cache import RecordCache
from expertd_client.rpc_aio import AsyncRpc
from expertstore.errors import (
    CapacityError,
    UnauthenticatedError,
    UnavailableError,
)
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role
from expertstore.v1 import expert_store_pb2 as pb

ReachedT = TypeVar("ReachedT")

__all__ = ["AsyncClient", "AsyncSession"]


class AsyncSession(BaseSession):
    """One attached worker. An async context manager that detaches."""

    def __init__(
        self,
        rpc: AsyncRpc,
        address: Address,
        attachment: Attachment | CopyAttachment,
        model: ModelInfo,
        timeout_seconds: float,
        cache_bytes: int | None,
    ) -> None:
        self._rpc = rpc
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._cache_bytes = cache_bytes
        super().__init__(attachment, model)

    async def __aenter__(self) -> "AsyncSession":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.detach()

    async def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        timeout_seconds: float | None = None,
        in_arena: bool = False,
    ) -> Lease:
        """See :meth:`Session.acquire`; ``with await session.acquire(...) as lease``."""
        found = self._acquire_resident(layer, experts)
        if isinstance(found, Lease):
            return found
        return await self._acquire_missing(
            layer, experts, found, timeout_seconds, in_arena=in_arena
        )

    async def waves(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        timeout_seconds: float | None = None,
        in_arena: bool = False,
    ) -> AsyncGenerator[Lease]:
        """See :meth:`Session.waves`."""
        size = WaveSize(self.model.max_fetch_records)
        start = 0
        while start < len(experts):
            found = self._acquire_resident(layer, experts[start:])
            while not isinstance(found, Lease):
                wave = experts[start : start + size.num_experts]
                if found.isdisjoint(self._entries_of(layer, wave)):
                    found = self._acquire_resident(layer, wave)
                    continue
                try:
                    found = await self._acquire_missing(
                        layer, wave, found, timeout_seconds, in_arena=in_arena, in_waves=True
                    )
                except CapacityError as error:
                    size.shrink(error)
            start += len(found.experts)
            yield found

    async def prefetch(self, experts: Sequence[tuple[int, int]], *, priority: int = 0) -> int:
        """See :meth:`Session.prefetch`."""
        absent = self.absent(experts)
        if not absent or not self.shares_memory:
            return 0
        return await self._call(calls.prefetch(absent, priority))

    async def pin(self, experts: Sequence[tuple[int, int]]) -> int:
        """See :meth:`Session.pin`."""
        self._check_pinnable()
        return await self._call(calls.pin(experts))

    async def unpin(self, experts: Sequence[tuple[int, int]] = ()) -> int:
        """See :meth:`Session.unpin`."""
        self._check_pinnable()
        return await self._call(calls.unpin(experts))

    async def reattach(self, timeout_seconds: float) -> None:
        """See :meth:`Session.reattach`."""
        previous = self._begin_reattach()
        deadline = time.monotonic() + timeout_seconds
        delays = retry_delays(timeout_seconds)
        while True:
            left = max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic())
            try:
                attachment, model = await _begin(
                    self._rpc,
                    self._address,
                    self.model.name,
                    left,
                    self._cache_bytes,
                    self._cache,
                    previous,
                )
                break
            except NOT_YET as error:
                delay = next(delays, None)
                if delay is None:
                    raise UnavailableError(
                        f"No daemon to reattach to within {timeout_seconds:g} s. {error}"
                    ) from None
            await asyncio.sleep(delay)
        self._finish_reattach(attachment, model)

    async def detach(self) -> None:
        """See :meth:`Session.detach`."""
        self._detached = True
        self._end()

    async def _acquire_missing(
        self,
        layer: int,
        experts: Sequence[int],
        missed: set[int],
        timeout_seconds: float | None,
        *,
        in_arena: bool = False,
        in_waves: bool = False,
    ) -> Lease:
        """Fetches them; the entries in ``missed`` were not resident."""
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        for _ in range(MAX_FETCHES):
            number = self._mapping.begin_fetch()
            try:
                left = deadline - time.monotonic()
                places = await self._bring(
                    layer, experts, number, left, in_arena=in_arena, in_waves=in_waves
                )
                lease = self._acquire_fetched(layer, experts, missed)
                while lease is None and places and await self._read_pack_in_thread(layer, places):
                    lease = self._acquire_fetched(layer, experts, missed)
            except BaseException:
                # A cancelled task, too.
                self._mapping.abandon_fetch()
                raise
            if lease is not None:
                return lease
        raise self._not_granted(layer)

    async def _read_pack_in_thread(self, layer: int, places: list[PackPlace]) -> bool:
        reading = asyncio.get_running_loop().run_in_executor(None, self._read_pack, layer, places)
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            # To its end: the thread writes where the next fetch's records come to lie.
            await asyncio.wait([reading])
            raise

    async def _bring(
        self,
        layer: int,
        experts: Sequence[int],
        number: int,
        timeout_seconds: float,
        *,
        in_arena: bool,
        in_waves: bool,
    ) -> list[PackPlace]:
        cache = self._cache
        if cache is None:
            call = self._fetch_call(layer, experts, number, in_arena=in_arena, in_waves=in_waves)
            return await self._call(call, timeout_seconds)
        fill = self._fill(cache, layer, experts)
        try:
            chunks = self._rpc.stream(
                self._read_call(fill),
                timeout_seconds=timeout_seconds,
                metadata=self._attachment.credentials,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    fill.feed(chunk)
        except SESSION_OVER as error:
            raise self._over(error) from None
        fill.finish()
        return []

    async def _call(
        self, call: calls.Call[calls.ResultT], timeout_seconds: float | None = None
    ) -> calls.ResultT:
        try:
            return await self._rpc.call(
                call,
                timeout_seconds=self._timeout_seconds
                if timeout_seconds is None
                else timeout_seconds,
                metadata=self._attachment.credentials,
            )
        except UnauthenticatedError:
            # Why the session is over says more than that its token is void.
            self._mapping.check_revoked()
            raise


class AsyncClient:
    """:class:`Client` for asyncio; an async context manager. For one event loop."""

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        tls: TlsFiles | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._address = parse_address(socket, tls)
        self._timeout_seconds = timeout_seconds
        self._rpc = AsyncRpc(self._address)
        self._sessions: weakref.WeakSet[AsyncSession] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._address} sessions={len(self._sessions)}>"

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def list_models(self) -> list[ModelSummary]:
        """See :meth:`Client.list_models`."""
        return await self._call(calls.list_models())

    async def get_model(self, name: str) -> ModelInfo:
        """See :meth:`Client.get_model`."""
        return await self._call(calls.get_model(name))

    async def attach(self, name: str, *, cache_bytes: int | None = None) -> AsyncSession:
        """See :meth:`Client.attach`."""
        attachment, model = await _begin(
            self._rpc, self._address, name, self._timeout_seconds, cache_bytes, None
        )
        session = AsyncSession(
            self._rpc, self._address, attachment, model, self._timeout_seconds, cache_bytes
        )
        self._sessions.add(session)
        return session

    async def stats(self) -> dict[str, Any]:
        """See :meth:`Client.stats`."""
        return await self._call(calls.get_stats())

    def watch_stats(self, interval_seconds: float = 1.0) -> AsyncGenerator[dict[str, Any]]:
        """See :meth:`Client.watch_stats`."""
        return self._rpc.stream(calls.watch_stats(interval_seconds), timeout_seconds=None)

    async def get_heat(self, name: str) -> pb.GetHeatResponse:
        """See :meth:`Client.get_heat`."""
        return await self._call(calls.get_heat(name))

    async def read(
        self,
        name: str,
        experts: Sequence[tuple[int, int]],
        *,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[Record]:
        """See :meth:`Client.read`."""
        assembler = RecordAssembler(experts)
        with await self._greet(Role.READER, name) as credentials:
            chunks = self._rpc.stream(
                calls.read(name, experts), timeout_seconds=timeout_seconds, metadata=credentials
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    record = assembler.feed(chunk)
                    if record is not None:
                        yield record
            assembler.finish()

    async def load_model(
        self,
        name: str,
        pack_path: str | Path,
        *,
        min_bytes: int = 0,
        max_bytes: int | None = None,
        pins: Sequence[str] = (),
        disk_io: str | None = None,
    ) -> ModelSummary:
        """See :meth:`Client.load_model`."""
        call = calls.load_model(
            name,
            Path(pack_path),
            min_bytes=min_bytes,
            max_bytes=max_bytes,
            pins=pins,
            disk_io=disk_io,
        )
        return await self._call_as_admin(call)

    async def set_limits(
        self, name: str, *, min_bytes: int | None = None, max_bytes: int | None = None
    ) -> ModelSummary:
        """See :meth:`Client.set_limits`."""
        return await self._call_as_admin(calls.set_limits(name, min_bytes, max_bytes))

    async def unload_model(self, name: str) -> int:
        """See :meth:`Client.unload_model`."""
        return await self._call_as_admin(calls.unload_model(name))

    async def close(self) -> None:
        """See :meth:`Client.close`."""
        for session in list(self._sessions):
            await session.detach()
        await self._rpc.close()

    async def _call(self, call: calls.Call[calls.ResultT]) -> calls.ResultT:
        return await self._rpc.call(call, timeout_seconds=self._timeout_seconds)

    async def _call_as_admin(self, call: calls.Call[calls.ResultT]) -> calls.ResultT:
        with await self._greet(Role.ADMIN, "") as credentials:
            return await self._rpc.call(
                call, timeout_seconds=self._timeout_seconds, metadata=credentials
            )

    async def _greet(self, role: Role, model: str) -> AbstractContextManager[Metadata]:
        """A session of that role while the block runs, where there are sessions."""
        if not isinstance(self._address, UnixAddress):
            return nullcontext(())
        directory, timeout_seconds = self._address.directory, self._timeout_seconds
        greeting = await _in_thread(lambda: handshake(directory, role, model, timeout_seconds))
        return credentials_of(greeting)


async def _in_thread(greet: Callable[[], ReachedT]) -> ReachedT:
    """A handshake, in a thread: asyncio cannot receive descriptors."""
    future = asyncio.get_running_loop().run_in_executor(None, greet)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        # The thread cannot be stopped; what it brings back is nobody's.
        future.add_done_callback(_discard)
        raise


def _discard(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


async def _begin(
    rpc: AsyncRpc,
    address: Address,
    model: str,
    timeout_seconds: float,
    cache_bytes: int | None,
    old: RecordCache | None,
    previous: Mapping | None = None,
) -> tuple[Attachment | CopyAttachment, ModelInfo]:
    deadline = time.monotonic() + timeout_seconds
    reached = None
    if isinstance(address, UnixAddress):
        directory = address.directory
        reached = await _in_thread(lambda: greet(directory, model, timeout_seconds, previous))
    try:
        info = await rpc.call(
            calls.get_model(model),
            timeout_seconds=max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic()),
            metadata=() if reached is None else reached.credentials,
            wait_for_ready=reached is not None,
        )
        return attachment_for(reached, info, cache_bytes, old)
    except BaseException:
        if reached is not None:
            reached.close()
        raise

"""The asyncio client: the sync one's calls, awaited.

A lease is the same object as there: holding and releasing cost no call, so there is
nothing in them to await.
"""

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from expertd.errors import (
    CapacityError,
    DeadlineError,
    UnauthenticatedError,
    UnavailableError,
)
from expertd.greeting import Greeting, handshake
from expertd.handshake import Role
from expertd_client import calls
from expertd_client.attachment import Attachment
from expertd_client.base_session import MAX_FETCHES, BaseSession, WaveSize, check_directory
from expertd_client.endpoint import MIN_TIMEOUT_SECONDS, retry_delays
from expertd_client.lease import Lease
from expertd_client.model import ModelInfo, ModelSummary
from expertd_client.record import Record, RecordAssembler
from expertd_client.rpc_aio import AsyncRpc

__all__ = ["AsyncClient", "AsyncSession"]


class AsyncSession(BaseSession):
    """One attached worker. An async context manager that detaches."""

    def __init__(
        self,
        rpc: AsyncRpc,
        directory: Path,
        attachment: Attachment,
        model: ModelInfo,
        timeout_seconds: float,
    ) -> None:
        self._rpc = rpc
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        super().__init__(attachment, model)

    async def __aenter__(self) -> "AsyncSession":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.detach()

    async def acquire(
        self, layer: int, experts: Sequence[int], *, timeout_seconds: float | None = None
    ) -> Lease:
        """See :meth:`Session.acquire`; ``with await session.acquire(...) as lease``."""
        lease = self._acquire_resident(layer, experts)
        if lease is not None:
            return lease
        return await self._acquire_missing(layer, experts, timeout_seconds)

    async def waves(
        self, layer: int, experts: Sequence[int], *, timeout_seconds: float | None = None
    ) -> AsyncGenerator[Lease]:
        """See :meth:`Session.waves`."""
        size = WaveSize(self.model.max_fetch_records)
        start = 0
        while start < len(experts):
            lease = self._acquire_resident(layer, experts[start:])
            while lease is None:
                wave = experts[start : start + size.num_experts]
                try:
                    lease = await self.acquire(layer, wave, timeout_seconds=timeout_seconds)
                except CapacityError as error:
                    size.shrink(error)
            start += len(lease.experts)
            yield lease

    async def prefetch(self, experts: Sequence[tuple[int, int]], *, priority: int = 0) -> int:
        """See :meth:`Session.prefetch`."""
        absent = self._absent_of(experts)
        if not absent:
            return 0
        return await self._call(calls.prefetch(absent, priority))

    async def pin(self, experts: Sequence[tuple[int, int]]) -> int:
        """See :meth:`Session.pin`."""
        self._mapping.check_attached()
        return await self._call(calls.pin(experts))

    async def unpin(self, experts: Sequence[tuple[int, int]] = ()) -> int:
        """See :meth:`Session.unpin`."""
        self._mapping.check_attached()
        return await self._call(calls.unpin(experts))

    async def reattach(self, timeout_seconds: float) -> None:
        """See :meth:`Session.reattach`."""
        self._begin_reattach()
        deadline = time.monotonic() + timeout_seconds
        delays = retry_delays(timeout_seconds)
        while True:
            left = max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic())
            try:
                attachment, model = await _begin(self._rpc, self._directory, self.model.name, left)
                break
            except (UnavailableError, DeadlineError) as error:
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
        self, layer: int, experts: Sequence[int], timeout_seconds: float | None
    ) -> Lease:
        missed = self._absent(layer, experts)
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        for _ in range(MAX_FETCHES):
            number = self._mapping.begin_fetch()
            try:
                await self._call(
                    calls.fetch(layer, dict.fromkeys(experts), number), deadline - time.monotonic()
                )
            except BaseException:
                # A cancelled task, too.
                self._mapping.abandon_fetch()
                raise
            lease = self._acquire_fetched(layer, experts, missed)
            if lease is not None:
                return lease
        raise self._not_granted(layer)

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

    def __init__(self, socket: str | Path, *, timeout_seconds: float = 30.0) -> None:
        self._directory = Path(socket).absolute()
        self._timeout_seconds = timeout_seconds
        self._rpc = AsyncRpc(self._directory)
        self._sessions: weakref.WeakSet[AsyncSession] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._directory} sessions={len(self._sessions)}>"

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

    async def attach(self, name: str) -> AsyncSession:
        """See :meth:`Client.attach`."""
        attachment, model = await _begin(self._rpc, self._directory, name, self._timeout_seconds)
        session = AsyncSession(self._rpc, self._directory, attachment, model, self._timeout_seconds)
        self._sessions.add(session)
        return session

    async def stats(self) -> dict[str, Any]:
        """See :meth:`Client.stats`."""
        return await self._call(calls.get_stats())

    def watch_stats(self, interval_seconds: float = 1.0) -> AsyncGenerator[dict[str, Any]]:
        """See :meth:`Client.watch_stats`."""
        return self._rpc.stream(calls.watch_stats(interval_seconds), timeout_seconds=None)

    async def read(
        self,
        name: str,
        experts: Sequence[tuple[int, int]],
        *,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[Record]:
        """See :meth:`Client.read`."""
        assembler = RecordAssembler(experts)
        greeting = await _handshake(self._directory, Role.READER, name, self._timeout_seconds)
        with greeting:
            chunks = self._rpc.stream(
                calls.read(name, experts),
                timeout_seconds=timeout_seconds,
                metadata=greeting.credentials,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    record = assembler.feed(chunk)
                    if record is not None:
                        yield record
            assembler.finish()

    async def load_model(self, name: str, pack_path: str | Path) -> ModelSummary:
        """See :meth:`Client.load_model`."""
        return await self._call_as_admin(calls.load_model(name, Path(pack_path)))

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
        with await _handshake(self._directory, Role.ADMIN, "", self._timeout_seconds) as greeting:
            return await self._rpc.call(
                call, timeout_seconds=self._timeout_seconds, metadata=greeting.credentials
            )


async def _handshake(directory: Path, role: Role, model: str, timeout_seconds: float) -> Greeting:
    """The handshake, in a thread: asyncio cannot receive descriptors."""
    future = asyncio.get_running_loop().run_in_executor(
        None, handshake, directory, role, model, timeout_seconds
    )
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        # The thread cannot be stopped; what it brings back is nobody's.
        future.add_done_callback(_discard)
        raise


def _discard(future: "asyncio.Future[Greeting]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


async def _begin(
    rpc: AsyncRpc, directory: Path, model: str, timeout_seconds: float
) -> tuple[Attachment, ModelInfo]:
    deadline = time.monotonic() + timeout_seconds
    with await _handshake(directory, Role.WORKER, model, timeout_seconds) as greeting:
        attachment = Attachment(greeting)
    try:
        info = await rpc.call(
            calls.get_model(model),
            timeout_seconds=max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic()),
            wait_for_ready=True,
        )
        check_directory(attachment, info)
    except BaseException:
        attachment.close()
        raise
    return attachment, info

"""The asyncio client's gRPC channel; what fails leaves here as an exception of expertd."""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import TypeVar

import grpc
import grpc.aio

from expertd_client.address import Address, UnixAddress
from expertd_client.calls import Call
from expertd_client.endpoint import Metadata, check_own_process
from expertstore.errors import ExpertdError, PreconditionError
from expertstore.v1 import expert_store_pb2_grpc as grpc_api

ResultT = TypeVar("ResultT")


class AsyncRpc:
    """Sends calls to the daemon at ``address``. It connects at the first one."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._pid = os.getpid()
        self._channel: grpc.aio.Channel | None = None
        self._stub: grpc_api.ExpertStoreStub | None = None
        self._closed = False

    async def call(
        self,
        call: Call[ResultT],
        *,
        timeout_seconds: float,
        metadata: Metadata = (),
        wait_for_ready: bool = False,
    ) -> ResultT:
        """The answer to a unary call. Raises ExpertdError."""
        method = getattr(self._open(), call.method)
        try:
            response = await method(
                call.request,
                timeout=timeout_seconds,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        except grpc.RpcError as error:
            raise await self._error(error) from None
        return call.decode(response)

    async def stream(
        self, call: Call[ResultT], *, timeout_seconds: float | None, metadata: Metadata = ()
    ) -> AsyncGenerator[ResultT]:
        """The answers to a streaming call, which ends when the iterator does."""
        method = getattr(self._open(), call.method)
        responses = method(call.request, timeout=timeout_seconds, metadata=metadata)
        try:
            async for response in responses:
                yield call.decode(response)
        except grpc.RpcError as error:
            raise await self._error(error) from None
        finally:
            responses.cancel()

    async def close(self) -> None:
        """Closes the channel; calls under way fail."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def _error(self, error: grpc.RpcError) -> ExpertdError:
        if isinstance(self._address, UnixAddress):
            return self._address.error(error)
        return await asyncio.to_thread(self._address.error, error)  # it tries the port

    def _open(self) -> grpc_api.ExpertStoreStub:
        check_own_process(self._pid)
        if self._closed:
            raise PreconditionError("This client is closed; make a new one.")
        if self._stub is None:
            # Not before: an asyncio channel belongs to the loop that runs when it is made.
            self._channel = self._address.open_aio()
            self._stub = grpc_api.ExpertStoreStub(self._channel)
        return self._stub

"""The sync client's gRPC channel; what fails leaves here as an exception of expertd."""

import os
from collections.abc import Generator
from typing import TypeVar

import grpc

from expertd_client.address import Address
from expertd_client.calls import Call
from expertd_client.endpoint import Metadata, check_own_process
from expertstore.errors import PreconditionError
from expertstore.v1 import expert_store_pb2_grpc as grpc_api

ResultT = TypeVar("ResultT")


class Rpc:
    """Sends calls to the daemon at ``address``. It connects at the first one."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._channel = address.open()
        self._stub = grpc_api.ExpertStoreStub(self._channel)
        self._pid = os.getpid()
        self._closed = False

    def call(
        self,
        call: Call[ResultT],
        *,
        timeout_seconds: float,
        metadata: Metadata = (),
        wait_for_ready: bool = False,
    ) -> ResultT:
        """The answer to a unary call. Raises ExpertdError."""
        self._check_open()
        method = getattr(self._stub, call.method)
        try:
            response = method(
                call.request,
                timeout=timeout_seconds,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        except grpc.RpcError as error:
            # Without its cause: a gRPC error prints as a page of its own insides.
            raise self._address.error(error) from None
        return call.decode(response)

    def stream(
        self, call: Call[ResultT], *, timeout_seconds: float | None, metadata: Metadata = ()
    ) -> Generator[ResultT]:
        """The answers to a streaming call, which ends when the iterator does."""
        self._check_open()
        method = getattr(self._stub, call.method)
        responses = method(call.request, timeout=timeout_seconds, metadata=metadata)
        try:
            for response in responses:
                yield call.decode(response)
        except grpc.RpcError as error:
            raise self._address.error(error) from None
        finally:
            responses.cancel()

    def close(self) -> None:
        """Closes the channel; calls under way fail."""
        self._closed = True
        self._channel.close()

    def _check_open(self) -> None:
        check_own_process(self._pid)
        if self._closed:
            raise PreconditionError("This client is closed; make a new one.")

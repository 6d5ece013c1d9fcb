"""The sync client's gRPC channel; what fails leaves here as an exception of expertd."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd_client.address import Address
from expertd_client.calls import Call
from expertd_client.endpoint import Metadata, check_own_process
from expertd_client.touches import TouchStream
from expertstore.errors import PreconditionError
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as grpc_api

ResultT = TypeVar("ResultT")
_HINT_SECONDS = 10.0


class Rpc:
    """Sends calls to the daemon at ``address``. It connects at the first one."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._channel = address.open()
        self._stub = grpc_api.ExpertStoreStub(self._channel)
        self._pid = os.getpid()
        self._closed = False
        self._sent: set[object] = set()

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

    def send(self, call: Call[ResultT], metadata: Metadata = ()) -> None:
        """Sends a hint: nobody waits for the answer, or hears of an error."""
        self._check_open()
        sent = getattr(self._stub, call.method).future(
            call.request, timeout=_HINT_SECONDS, metadata=metadata
        )
        # gRPC cancels a call that nobody refers to.
        self._sent.add(sent)
        sent.add_done_callback(self._sent.discard)

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

    @contextmanager
    def touches(
        self,
        call: Call[pb.WatchTouchesResponse],
        *,
        timeout_seconds: float | None,
        metadata: Metadata,
    ) -> Generator[TouchStream]:
        """Accesses from the moment on when the block begins, to its end."""
        self._check_open()
        responses = getattr(self._stub, call.method)(
            call.request, timeout=timeout_seconds, metadata=metadata
        )
        try:
            responses.initial_metadata()  # there when the daemon has begun
            yield TouchStream(responses, self._address.error)
        finally:
            responses.cancel()

    def serves(self, timeout_seconds: float) -> bool:
        """Whether the daemon says that it serves, by grpc.health.v1."""
        self._check_open()
        try:
            response = health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            raise self._address.error(error) from None
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Closes the channel; calls under way fail."""
        self._closed = True
        self._channel.close()

    def _check_open(self) -> None:
        check_own_process(self._pid)
        if self._closed:
            raise PreconditionError("This client is closed; make a new one.")

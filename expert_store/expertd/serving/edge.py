"""The service's edge, where exceptions become status codes."""

from __future__ import annotations  # grpc.aio's types take parameters only in the stubs

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from expertd.log import log_failure
from expertstore.errors import DeadlineError, ExpertdError, InvalidInputError
from expertstore.status import to_status

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_Decode = Callable[[bytes], Message]


class Edge:
    """Turns exceptions into status codes, in this one place, and counts them.

    A stream whose reader takes nothing for ``stall_seconds`` is ended: what is on its way to it
    is memory that others wait for. ``refusals`` counts under (``door``, code). A request longer
    than ``longest_request`` tells is not taken apart: half a million experts fit into what gRPC
    lets through, and cost a hundred times their bytes.

    It wraps the service's methods and is no server interceptor, which would make an empty call
    take a tenth longer.
    """

    def __init__(
        self,
        stall_seconds: float,
        refusals: Counter[tuple[str, str]],
        door: str,
        longest_request: Callable[[], int],
    ) -> None:
        self._stall_seconds, self._refusals, self._door = stall_seconds, refusals, door
        self._longest_request = longest_request

    def handler(self, service: object, descriptor: ServiceDescriptor) -> grpc.GenericRpcHandler:
        """The methods of ``service``, which are named as in ``descriptor``, for a server."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in descriptor.methods:
            decode = GetMessageClass(method.input_type).FromString
            encode = GetMessageClass(method.output_type).SerializeToString
            behavior = getattr(service, method.name)
            if method.server_streaming:
                handlers[method.name] = grpc.unary_stream_rpc_method_handler(
                    self._streaming(behavior, decode), None, encode
                )
            else:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                    self._unary(behavior, decode), None, encode
                )
        return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)

    def _streaming(self, behavior: Any, decode: _Decode) -> Any:  # noqa: ANN401
        async def wrapped(data: bytes, context: Context) -> None:
            try:
                request = self._decode(decode, data)
                async with aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        await self._write(context, response)
            except Exception as error:
                await self._abort(context, error)

        return wrapped

    def _unary(self, behavior: Any, decode: _Decode) -> Any:  # noqa: ANN401
        async def wrapped(data: bytes, context: Context) -> Any:  # noqa: ANN401
            try:
                return await behavior(self._decode(decode, data), context)
            except Exception as error:
                await self._abort(context, error)

        return wrapped

    async def _write(self, context: Context, response: Any) -> None:  # noqa: ANN401
        try:
            async with asyncio.timeout(self._stall_seconds):
                await context.write(response)
        except TimeoutError:
            raise DeadlineError(
                f"the reader of this stream took nothing for {self._stall_seconds:g} s; call again."
            ) from None

    def _decode(self, decode: _Decode, data: bytes) -> Message:
        """The request in ``data``: here and not in gRPC, which would answer UNKNOWN to garbage."""
        most = self._longest_request()
        if len(data) > most:
            raise InvalidInputError(
                f"the request has {len(data)} bytes; a list of all experts of the largest model "
                f"here takes less than {most}."
            )
        try:
            return decode(data)
        except DecodeError:
            raise InvalidInputError(
                "the request is not what this call takes; run the same version on both sides."
            ) from None

    async def _abort(self, context: Context, error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, ExpertdError):
            log_failure("a call")
        status = to_status(error)
        self._refusals[self._door, status.code.name] += 1
        await context.abort(status.code, status.message, status.trailing_metadata)

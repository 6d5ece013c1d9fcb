"""The service's edge, where exceptions become status codes."""

from __future__ import annotations  # grpc.aio's types take parameters only in the stubs

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from expertd.errors import DeadlineError, ExpertdError, InvalidInputError
from expertd.log import log_failure
from expertd.status import to_status

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions into status codes, in this one place, and counts them.

    A stream whose reader takes nothing for ``stall_seconds`` is ended: what is on its way to it
    is memory that others wait for. ``refusals`` counts under (``door``, code). A request longer
    than ``longest_request`` tells is not taken apart: half a million experts fit into what gRPC
    lets through, and cost a hundred times their bytes.
    """

    def __init__(
        self,
        stall_seconds: float,
        refusals: Counter[tuple[str, str]],
        door: str,
        longest_request: Callable[[], int],
    ) -> None:
        self._stall_seconds, self._refusals, self._door = stall_seconds, refusals, door
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._longest_request = longest_request

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of one call."""
        method = handler_call_details.method
        if method in self._wrapped:  # to find and wrap it anew is a tenth of an empty call
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith("/expertstore."):
            return handler
        self._wrapped[method] = self._wrap(handler)
        return self._wrapped[method]

    def _wrap(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.response_streaming:
            stream: Any = handler.unary_stream  # the stubs type only the synchronous server's

            async def wrapped_stream(data: bytes, context: Context) -> None:
                try:
                    request = self._decode(handler, data)
                    async with aclosing(stream(request, context)) as responses:
                        async for response in responses:
                            await self._write(context, response)
                except Exception as error:
                    await self._abort(context, error)

            return grpc.unary_stream_rpc_method_handler(
                wrapped_stream, None, handler.response_serializer
            )
        unary: Any = handler.unary_unary

        async def wrapped(data: bytes, context: Context) -> Any:  # noqa: ANN401
            try:
                return await unary(self._decode(handler, data), context)
            except Exception as error:
                await self._abort(context, error)

        return grpc.unary_unary_rpc_method_handler(wrapped, None, handler.response_serializer)

    async def _write(self, context: Context, response: Any) -> None:  # noqa: ANN401
        try:
            async with asyncio.timeout(self._stall_seconds):
                await context.write(response)
        except TimeoutError:
            raise DeadlineError(
                f"the reader of this stream took nothing for {self._stall_seconds:g} s; call again."
            ) from None

    def _decode(self, handler: grpc.RpcMethodHandler[Any, Any], data: bytes) -> Any:  # noqa: ANN401
        """The request in ``data``: here and not in gRPC, which would answer UNKNOWN to garbage."""
        most = self._longest_request()
        if len(data) > most:
            raise InvalidInputError(
                f"the request has {len(data)} bytes; a list of all experts of the largest model "
                f"here takes less than {most}."
            )
        decode: Any = handler.request_deserializer
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

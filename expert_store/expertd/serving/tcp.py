"""The TCP listener: the same service, for those whose certificate says who they are."""

from __future__ import annotations  # grpc.aio's types take parameters only in the stubs

import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from expertd.hosting.peers import Peers
from expertd.serving.certificates import Certificates
from expertd.settings.loopback import listen_remedy
from expertd.settings.tcp_config import TcpConfig
from expertstore.errors import ConfigError, PermissionDeniedError
from expertstore.status import to_status

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

OPTIONS = (
    # Else two daemons of one user could share a port, and clients would find either.
    ("grpc.so_reuseport", 0),
    # Who connects and says nothing, and how many may.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_allowed_incoming_connections", 512),
    ("grpc.max_concurrent_streams", 32),
    # A host that vanished is noticed, and its streams end; one may ask for signs of life
    # every 10 s, but not more often.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_metadata_size", 8 << 10),
    # New certificates and authorities come into force for old connections too.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
)


class PeerInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call, health checks too, of those who are not on the list.

    ``refusals`` counts them under ("tcp", code).
    """

    def __init__(self, peers: Peers, refusals: Counter[tuple[str, str]]) -> None:
        self._peers, self._refusals = peers, refusals

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        inner: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def check(context: Context) -> None:
            try:
                self._peers.of(context)
            except PermissionDeniedError as error:
                status = to_status(error)
                self._refusals["tcp", status.code.name] += 1
                await context.abort(status.code, status.message, status.trailing_metadata)

        if handler.response_streaming:

            async def stream(request: Any, context: Context) -> None:  # noqa: ANN401
                await check(context)
                await inner(request, context)

            return grpc.unary_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )

        async def unary(request: Any, context: Context) -> Any:  # noqa: ANN401
            await check(context)
            return await inner(request, context)

        return grpc.unary_unary_rpc_method_handler(
            unary, handler.request_deserializer, handler.response_serializer
        )


def open_port(server: grpc.aio.Server, config: TcpConfig) -> str:
    """Opens the port, and says where. Raises :class:`ConfigError`."""
    host, port = config.address
    # gRPC says only that it failed.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        reason = error.strerror or str(error)
        raise _unusable(config, reason, listen_remedy(error)) from error
    shown = f"[{host}]" if ":" in host else host
    try:
        if config.plaintext:
            port = server.add_insecure_port(f"{shown}:{port}")
        else:
            port = server.add_secure_port(f"{shown}:{port}", Certificates(config).credentials())
    except RuntimeError as error:
        raise _unusable(config, "it is taken", "give another port") from error
    return f"{shown}:{port}"


def _unusable(config: TcpConfig, reason: str, remedy: str) -> ConfigError:
    return ConfigError(f"tcp.listen {config.listen} cannot be used: {reason}; {remedy}.")

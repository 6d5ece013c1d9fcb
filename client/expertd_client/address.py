"""Where a daemon is: a directory of this host, or a TCP port of any."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from expertd_client.diagnosis import explain
from expertd_client.endpoint import CHANNEL_OPTIONS
from expertstore.errors import ExpertdError, InvalidInputError
from expertstore.shared import unreachable
from expertstore.shared.handshake import rpc_target
from expertstore.socket_directory import find_daemon
from expertstore.status import from_rpc_error
from expertstore.tls_files import TlsIdentity, read_identity

TCP = "tcp://"

_TCP_OPTIONS = (
    *CHANNEL_OPTIONS,
    # A host that vanished is noticed while a call waits for it.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Gigabytes of records are nothing for a web proxy.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: who may have signed the daemon's certificate, and who this client is."""

    ca: Path | str
    certificate: Path | str
    key: Path | str


@dataclass(frozen=True)
class UnixAddress:
    """The directory that a daemon of this host serves in."""

    directory: Path

    def __str__(self) -> str:
        return str(self.directory)

    def open(self) -> grpc.Channel:
        """A channel for threads."""
        return grpc.insecure_channel(rpc_target(self.directory), CHANNEL_OPTIONS)

    def open_aio(self) -> grpc.aio.Channel:
        """A channel for the event loop that runs."""
        return grpc.aio.insecure_channel(rpc_target(self.directory), CHANNEL_OPTIONS)

    def error(self, error: grpc.RpcError) -> ExpertdError:
        """What a call that failed with ``error`` raises."""
        return from_rpc_error(error, str(self), partial(unreachable.explain, self.directory))


@dataclass(frozen=True)
class TcpAddress:
    """A port, and who to be there; ``identity`` is None for plaintext, on loopback only."""

    host: str
    port: int
    files: TlsFiles | None
    identity: TlsIdentity | None

    def __str__(self) -> str:
        return f"{TCP}{self.target}"

    @property
    def target(self) -> str:
        """Host and port as gRPC wants them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def open(self) -> grpc.Channel:
        """A channel for threads."""
        if self.identity is None:
            return grpc.insecure_channel(self.target, _TCP_OPTIONS)
        return grpc.secure_channel(self.target, _credentials(self.identity), _TCP_OPTIONS)

    def open_aio(self) -> grpc.aio.Channel:
        """A channel for the event loop that runs."""
        options: Sequence[tuple[str, Any]] = _TCP_OPTIONS
        if self.identity is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, _credentials(self.identity), options)

    def error(self, error: grpc.RpcError) -> ExpertdError:
        """What a call that failed with ``error`` raises; may take seconds to find out."""
        certificate = str(self.files.certificate) if self.files else ""
        why = partial(explain, self.host, self.port, self.identity, certificate)
        return from_rpc_error(error, str(self), why)


Address = UnixAddress | TcpAddress


def parse_address(text: str | Path | None, tls: TlsFiles | None) -> Address:
    """A directory's path, or ``tcp://HOST:PORT``. Raises InvalidInputError, naming the mistake.

    ``None`` is the directory of this host's daemon; see :mod:`expertstore.socket_directory`.
    """
    text = find_daemon() if text is None else text
    if not isinstance(text, str) or not text.startswith(TCP):
        if tls is not None:
            raise InvalidInputError(
                f"{text} is a directory of this host, where TLS has no place; give "
                "tcp://HOST:PORT, or no certificates."
            )
        return UnixAddress(Path(text).absolute())
    host, _, port = text.removeprefix(TCP).rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "/" in host:
        host = ""
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInputError(
            f"{text} is no address; give tcp://HOST:PORT, as in tcp://store.lab:7443."
        )
    if tls is None:
        if not _is_loopback(host):
            raise InvalidInputError(
                f"{text} is another host, which asks for a certificate; give tls=TlsFiles(ca, "
                "certificate, key)."
            )
        return TcpAddress(host, int(port), None, None)
    identity = read_identity(Path(tls.certificate), Path(tls.key), Path(tls.ca))
    return TcpAddress(host, int(port), tls, identity)


def _credentials(identity: TlsIdentity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Who calls by TCP: the name in its certificate, what it may do, what it has read."""

from __future__ import annotations  # grpc.aio's types take parameters only in the stubs

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from expertd.log import log_warning
from expertd.settings.tcp_config import TcpConfig
from expertstore.errors import CapacityError, PermissionDeniedError

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

PLAINTEXT_NAME = "(plaintext)"
_MAX_PEERS = 256
_MAX_LOGGED = 64
_MAX_SHOWN_BYTES = 128


class Peer:
    """One name that has called."""

    def __init__(self, name: str, max_reads: int) -> None:
        self.name = name
        self.bytes_read = 0
        self.num_reads = 0
        self.last_call = time.monotonic()
        self._max_reads = max_reads

    def __repr__(self) -> str:
        return f"Peer({self.name}, {self.num_reads} reads, {self.bytes_read} bytes read)"

    def begin_read(self) -> None:
        """Counts a stream in. Raises :class:`CapacityError` if it is one too many."""
        if self.num_reads >= self._max_reads:
            raise CapacityError(
                f"{self.name} has {self.num_reads} reads under way, the most that tcp.max_reads "
                "allows; wait for one, or name more experts in each.",
                requested=self.num_reads + 1,
                available=self._max_reads,
                unit="reads",
            )
        self.num_reads += 1

    def end_read(self) -> None:
        """Counts it out."""
        self.num_reads -= 1


class Peers:
    """Those who have called by TCP, by name."""

    def __init__(self, config: TcpConfig) -> None:
        self._config = config
        self._peers: dict[str, Peer] = {}
        self._logged: set[str] = set()

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def of(self, context: Context) -> Peer | None:
        """Who makes this call; None for a process of this host, by the Unix socket.

        Raises :class:`PermissionDeniedError` if none of its names is allowed.
        """
        if context.peer().startswith("unix:"):
            return None
        name = PLAINTEXT_NAME if self._config.plaintext else self._allowed_name(context)
        peer = self._peers.get(name)
        if peer is None:
            self._make_room()
            peer = self._peers[name] = Peer(name, self._config.max_reads)
        peer.last_call = time.monotonic()
        return peer

    def _allowed_name(self, context: Context) -> str:
        names = certificate_names(context.auth_context())
        for name in names:
            if any(matches(name, pattern) for pattern in self._config.allowed_names):
                return name
        shown = ", ".join(names)[:_MAX_SHOWN_BYTES] or "no name"
        if shown not in self._logged and len(self._logged) < _MAX_LOGGED:
            self._logged.add(shown)
            log_warning("peer refused", names=shown, address=context.peer())
        raise PermissionDeniedError(
            f"a certificate for {shown} is not on this expertd's list; add the name to "
            "tcp.allowed_names."
        )

    def _make_room(self) -> None:
        """Forgets who has been silent for longest: a wildcard stands for any number of names."""
        if len(self._peers) >= _MAX_PEERS:
            idle = [peer for peer in self._peers.values() if not peer.num_reads]
            for peer in sorted(idle, key=lambda peer: peer.last_call)[:1]:
                del self._peers[peer.name]


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> list[str]:
    """DNS names and URIs of the verified certificate, or its common name if it has no others."""

    def values(key: str) -> list[str]:
        return [value.decode(errors="replace") for value in auth_context.get(key, ())]

    if values("x509_subject_alternative_name"):
        return values("peer_dns") + values("peer_uri")
    return [name for name in values("x509_common_name") if name]


def matches(name: str, pattern: str) -> bool:
    """Whether a certificate's name is the one on the list; ``*.`` stands for one label."""
    if "://" in pattern or "://" in name:
        return name == pattern
    name, pattern = name.lower(), pattern.lower()
    if pattern.startswith("*."):
        label, _, rest = name.partition(".")
        return bool(label) and label != "*" and rest == pattern[2:]
    return name == pattern

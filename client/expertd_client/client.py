"""The sync client."""

import weakref
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from expertd_client import calls
from expertd_client.address import TlsFiles, UnixAddress, parse_address
from expertd_client.attaching import credentials_of
from expertd_client.endpoint import Metadata
from expertd_client.model import ModelInfo, ModelSummary
from expertd_client.record import Record, RecordAssembler
from expertd_client.rpc import Rpc
from expertd_client.session import Session
from expertd_client.touches import TouchStream
from expertstore.closing import Closing
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role
from expertstore.v1 import expert_store_pb2 as pb


class Client(Closing):
    """Talks to the daemon that serves in the directory ``socket``, or at ``tcp://HOST:PORT``.

    Without ``socket``: the one in ``$XDG_RUNTIME_DIR/expertd`` or in ``/run/expertd``.
    By TCP the two sides prove to each other who they are, with the files in ``tls`` (not
    needed on loopback, if that daemon wants no certificate). A mistake in them is a
    ConfigError at once.
    A context manager that closes. Nothing is connected before the first call, each of which
    raises ExpertdError's kinds only: DeadlineError after ``timeout_seconds``,
    UnavailableError if no daemon answers. May be used by several threads.
    """

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        tls: TlsFiles | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        self._address = parse_address(socket, tls)
        self._timeout_seconds = timeout_seconds
        self._rpc = Rpc(self._address)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Client {self._address} sessions={len(self._sessions)}>"

    def list_models(self) -> list[ModelSummary]:
        """The models that the daemon holds."""
        return self._call(calls.list_models())

    def get_model(self, name: str) -> ModelInfo:
        """One model: where its pack lies, its layers, its records' layout."""
        return self._call(calls.get_model(name))

    def attach(self, name: str, *, cache_bytes: int | None = None) -> Session:
        """Becomes a worker of model ``name``, with the arena mapped.

        Where the daemon's memory cannot be mapped, by TCP or in a sandbox, the session has
        copies of the records that it uses, in at most ``cache_bytes`` of memory (without it:
        what all of them take, or half of the free memory); see ``Session.shares_memory``.
        Raises InvalidInputError if those are fewer than what one token uses of a layer.
        """
        session = Session(self._rpc, self._address, name, self._timeout_seconds, cache_bytes)
        self._sessions.add(session)
        return session

    def stats(self) -> dict[str, Any]:
        """The daemon's stats: plain values under the names of docs/client.md."""
        return self._call(calls.get_stats())

    def watch_stats(self, interval_seconds: float = 1.0) -> Generator[dict[str, Any]]:
        """The stats now and after every interval, until the caller stops."""
        return self._rpc.stream(calls.watch_stats(interval_seconds), timeout_seconds=None)

    def read(
        self,
        name: str,
        experts: Sequence[tuple[int, int]],
        *,
        timeout_seconds: float | None = None,
    ) -> Generator[Record]:
        """Records of (layer, expert) pairs as copies, in order, checked against their checksums.

        For what cannot map shared memory. The timeout is that of the whole stream; none
        unless given, since it lasts as long as its reader takes.
        """
        assembler = RecordAssembler(experts)
        with self._greet(Role.READER, name) as credentials:
            chunks = self._rpc.stream(
                calls.read(name, experts), timeout_seconds=timeout_seconds, metadata=credentials
            )
            with closing(chunks):
                for chunk in chunks:
                    record = assembler.feed(chunk)
                    if record is not None:
                        yield record
            assembler.finish()

    def serves(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether the daemon says that it serves, by grpc.health.v1."""
        return self._rpc.serves(timeout_seconds or self._timeout_seconds)

    def get_heat(self, name: str) -> pb.GetHeatResponse:
        """How hot each of the model's experts is, and which are resident (docs/rpc.md)."""
        return self._call(calls.get_heat(name))

    @contextmanager
    def watch_touches(
        self, name: str, *, timeout_seconds: float | None = None
    ) -> Generator[TouchStream]:
        """What the sessions of a model use from now on; the daemon's own user or root only.

        It lasts until the block's end, until it is stopped, or for the timeout.
        """
        with (
            self._greet(Role.ADMIN, "") as credentials,
            self._rpc.touches(
                calls.watch_touches(name), timeout_seconds=timeout_seconds, metadata=credentials
            ) as touches,
        ):
            yield touches

    def load_model(
        self,
        name: str,
        pack_path: str | Path,
        *,
        min_bytes: int = 0,
        max_bytes: int | None = None,
        pins: Sequence[str] = (),
        disk_io: str | None = None,
    ) -> ModelSummary:
        """Has the daemon serve the pack in ``pack_path`` as ``name``; its own user or root only.

        Other models leave it ``min_bytes`` of RAM, it takes at most ``max_bytes``, and experts in
        ``pins`` (``LAYER:EXPERT``, numbers, ranges or ``*``) stay resident. ``disk_io`` is how its
        pack is read: auto, direct or mmap; the daemon's settings say unless given.
        """
        return self._call_as_admin(
            calls.load_model(
                name,
                Path(pack_path),
                min_bytes=min_bytes,
                max_bytes=max_bytes,
                pins=pins,
                disk_io=disk_io,
            )
        )

    def set_limits(
        self, name: str, *, min_bytes: int | None = None, max_bytes: int | None = None
    ) -> ModelSummary:
        """Changes how much RAM a model keeps and may take; its own user or root only.

        None leaves a limit as it is; a maximum of 0 is none.
        """
        return self._call_as_admin(calls.set_limits(name, min_bytes, max_bytes))

    def unload_model(self, name: str) -> int:
        """Has the daemon drop a model; the bytes that this frees; its own user or root only."""
        return self._call_as_admin(calls.unload_model(name))

    def close(self) -> None:
        """Detaches all sessions and closes the channel; a second call does nothing."""
        for session in list(self._sessions):
            session.detach()
        self._rpc.close()

    def _call(self, call: calls.Call[calls.ResultT]) -> calls.ResultT:
        return self._rpc.call(call, timeout_seconds=self._timeout_seconds)

    def _call_as_admin(self, call: calls.Call[calls.ResultT]) -> calls.ResultT:
        with self._greet(Role.ADMIN, "") as credentials:
            return self._rpc.call(call, timeout_seconds=self._timeout_seconds, metadata=credentials)

    def _greet(self, role: Role, model: str) -> AbstractContextManager[Metadata]:
        """A session of that role while the block runs, where there are sessions."""
        if not isinstance(self._address, UnixAddress):
            return nullcontext(())
        directory = self._address.directory
        return credentials_of(handshake(directory, role, model, self._timeout_seconds))

"""A worker without the client: does what it is told, also what no client would."""

import mmap
import os
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import grpc

from expertstore.shared.directory import DirectoryView, unpack_word
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import NUDGE, Role, rpc_target
from expertstore.shared.session_page import SessionPage
from expertstore.status import from_rpc_error
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

Credentials = tuple[tuple[str, str | bytes], ...]


class Caller:
    """The RPC side alone. Raises the errors of ``expertstore.errors``."""

    def __init__(self, directory: Path, credentials: Credentials = ()) -> None:
        self.directory, self.credentials = directory, credentials
        self._channel = grpc.insecure_channel(rpc_target(directory))
        self.stub = rpc.ExpertStoreStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def call(self, name: str, request: Any, seconds: float = 20.0) -> Any:
        try:
            return getattr(self.stub, name)(request, timeout=seconds, metadata=self.credentials)
        except grpc.RpcError as error:
            raise from_rpc_error(error, str(self.directory)) from None

    def stats(self) -> pb.Stats:
        stats: pb.Stats = self.call("GetStats", pb.GetStatsRequest()).stats
        return stats

    def close(self) -> None:
        self._channel.close()


class RawWorker(Caller):
    """Attached to a model whose layers have ``num_experts`` each.

    ``answering``: a thread publishes when nudged, unless the worker holds.
    """

    def __init__(
        self, directory: Path, model: str = "m", *, num_experts: int = 8, answering: bool = True
    ) -> None:
        with handshake(directory, Role.WORKER, model, 10) as greeting:
            self.welcome, self.connection = greeting.welcome, greeting.take_connection()
            arena, table, page = greeting.descriptors
            self.arena = mmap.mmap(arena, os.fstat(arena).st_size, access=mmap.ACCESS_READ)
            words = mmap.mmap(table, os.fstat(table).st_size, access=mmap.ACCESS_READ)
            self.directory_view = DirectoryView(memoryview(words).cast("Q"))
            self.page = SessionPage(memoryview(mmap.mmap(page, os.fstat(page).st_size)))
            super().__init__(directory, greeting.credentials)
        self.call("GetModel", pb.GetModelRequest(name=model))  # before the first look-up
        self.id = self.welcome.session
        self.holding = False
        self.num_nudges = 0
        self._num_experts = num_experts
        self._mutex = threading.Lock()
        self._number = 0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        if answering:
            self._thread.start()

    def hold(self) -> None:
        """W1."""
        with self._mutex:
            self.holding = True

    def let_go(self) -> None:
        """W3 and W4, and the end of all leases."""
        with self._mutex:
            self.holding = False
            self.page.released_fetch = self._number
            self.page.epoch = self.directory_view.epoch

    def fetch(
        self, layer: int, experts: Iterable[int], *, number: int | None = None, seconds: float = 20
    ) -> list[int]:
        """Fetches and goes on holding; the directory words."""
        experts = list(experts)
        self.call("Fetch", self.fetch_request(layer, experts, number=number), seconds)
        self.hold()
        return [self.directory_view.word(self.entry(layer, expert)) for expert in experts]

    def fetch_request(
        self, layer: int, experts: Iterable[int], *, number: int | None = None
    ) -> pb.FetchRequest:
        """For a call that is not waited for here."""
        self._number = self._number + 1 if number is None else number
        refs = [pb.ExpertRef(layer=layer, expert=expert) for expert in experts]
        return pb.FetchRequest(experts=refs, fetch_number=self._number)

    def prefetch(self, layer: int, experts: Iterable[int]) -> int:
        refs = [pb.ExpertRef(layer=layer, expert=expert) for expert in experts]
        accepted: int = self.call("Prefetch", pb.PrefetchRequest(experts=refs)).num_accepted
        return accepted

    def entry(self, layer: int, expert: int) -> int:
        return layer * self._num_experts + expert

    def read(self, layer: int, expert: int, num_bytes: int) -> bytes | None:
        """W2: what the arena holds of that expert; None if it is absent."""
        location = unpack_word(self.directory_view.word(self.entry(layer, expert)))
        if location is None:
            return None
        return self.arena[location.offset : location.offset + num_bytes]

    def touch(self, layer: int, experts: Iterable[int], missed: Iterable[int] = ()) -> None:
        entries = [self.entry(layer, expert) for expert in experts]
        self.page.touch(entries, {self.entry(layer, expert) for expert in missed})

    def ended(self, seconds: float = 5.0) -> bool:
        """Whether the daemon hangs up within that time; for one that is not answering."""
        self.connection.settimeout(seconds)
        try:
            while self.connection.recv(16):
                pass
        except TimeoutError:
            return False
        return True

    def detach(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        self.connection.close()

    def close(self) -> None:
        self.detach()
        super().close()

    def _listen(self) -> None:
        while True:
            try:
                packet = self.connection.recv(16)
            except OSError:
                return
            if packet != NUDGE:
                return
            self.num_nudges += 1
            with self._mutex:
                if not self.holding:
                    self.page.epoch = self.directory_view.epoch

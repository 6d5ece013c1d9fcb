"""The sync session."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from expertd_client import calls
from expertd_client.address import Address, UnixAddress
from expertd_client.annex import PackPlace
from expertd_client.attaching import attachment_for, greet
from expertd_client.attachment import Attachment
from expertd_client.base_session import MAX_FETCHES, NOT_YET, SESSION_OVER, BaseSession, WaveSize
from expertd_client.copy_attachment import CopyAttachment
from expertd_client.endpoint import MIN_TIMEOUT_SECONDS, retry_delays
from expertd_client.lease import Lease
from expertd_client.mapping import Mapping
from expertd_client.model import ModelInfo
from expertd_client.record_cache import RecordCache
from expertd_client.rpc import Rpc
from expertstore.errors import CapacityError, UnauthenticatedError, UnavailableError


class Session(BaseSession):
    """One attached worker. A context manager that detaches."""

    def __init__(
        self,
        rpc: Rpc,
        address: Address,
        model: str,
        timeout_seconds: float,
        cache_bytes: int | None,
    ) -> None:
        self._rpc = rpc
        self._address = address
        self._timeout_seconds = timeout_seconds
        self._cache_bytes = cache_bytes
        super().__init__(*self._begin(model, timeout_seconds, None))

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        timeout_seconds: float | None = None,
        in_arena: bool = False,
    ) -> Lease:
        """Experts of one layer, resident and staying so until the lease is released.

        Those that are all resident cost no call; else all are fetched by one. Those for which
        the arena has no slot are read from the pack into memory of this process; unless
        ``in_arena``: then they are waited for, and are where others see them too. A session has
        one lease at a time: acquiring with one in hand is a PreconditionError. Raises
        NotFoundError, CapacityError if more was asked for than can ever be resident at once
        (then see :meth:`waves`), RecordLostError, DeadlineError, and UnavailableError,
        IncarnationError or SessionLostError, after which :meth:`reattach` helps.
        """
        found = self._acquire_resident(layer, experts)
        if isinstance(found, Lease):
            return found
        return self._acquire_missing(layer, experts, found, timeout_seconds, in_arena=in_arena)

    def waves(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        timeout_seconds: float | None = None,
        in_arena: bool = False,
    ) -> Iterator[Lease]:
        """``experts`` in consecutive runs, each a lease of as many as fit.

        Release each before taking the next. All at once if all are resident. The timeout is
        each wave's. The other arguments, and what is raised, are :meth:`acquire`'s.
        """
        size = WaveSize(self.model.max_fetch_records)
        start = 0
        while start < len(experts):
            found = self._acquire_resident(layer, experts[start:])
            while not isinstance(found, Lease):
                wave = experts[start : start + size.num_experts]
                if found.isdisjoint(self._entries_of(layer, wave)):
                    found = self._acquire_resident(layer, wave)
                    continue
                try:
                    found = self._acquire_missing(
                        layer, wave, found, timeout_seconds, in_arena=in_arena, in_waves=True
                    )
                except CapacityError as error:
                    size.shrink(error)
            start += len(found.experts)
            yield found

    def prefetch(self, experts: Sequence[tuple[int, int]], *, priority: int = 0) -> int:
        """Hints which (layer, expert) pairs are wanted next, likeliest first.

        Returns how many reads that caused. Costs no call if all are resident. A newer hint
        supersedes what an older one has not begun; it evicts nothing that a running step
        uses. Allowed while a lease is held. Does nothing in a session that has copies.
        """
        absent = self.absent(experts)
        if not absent or not self.shares_memory:
            return 0
        return self._call(calls.prefetch(absent, priority))

    def expect(self, experts: Sequence[tuple[int, int]]) -> None:
        """:meth:`prefetch` that waits for no answer; any thread may, also while a lease is held."""
        absent = self.absent(experts) if self.shares_memory else []
        if absent:
            self._rpc.send(calls.prefetch(absent, 0), self._attachment.credentials)

    def fetch_rows(self, table: int, rows: bytes, used: bytes = b"") -> bytes:
        """Rows of a table by numbers of 8 bytes each; see :mod:`expertd_client.table_rows`.

        ``used`` are rows that were found in the arena. Raises NotFoundError, RecordLostError, and
        as :meth:`acquire` where the session is over.
        """
        call = calls.fetch_rows(table, rows, used, self.model.name)
        if self.shares_memory:
            return self._call(call)
        try:
            return self._call(call)
        except SESSION_OVER as error:
            raise self._over(error) from None

    def prefetch_rows(self, table: int, rows: bytes, used: bytes = b"") -> None:
        """Hints which rows are wanted next, and waits for nothing; any thread may."""
        self._rpc.send(calls.prefetch_rows(table, rows, used), self._attachment.credentials)

    def tell_used(self, table: int, used: bytes) -> None:
        """Tells which rows were found in the arena, and waits until the daemon knows."""
        self._call(calls.prefetch_rows(table, b"", used))

    def pin(self, experts: Sequence[tuple[int, int]]) -> int:
        """Keeps (layer, expert) pairs resident while the session lasts; how many it pinned.

        Raises PreconditionError in a session that has copies.
        """
        self._check_pinnable()
        return self._call(calls.pin(experts))

    def unpin(self, experts: Sequence[tuple[int, int]] = ()) -> int:
        """Undoes :meth:`pin`, for all if none are named; how many it undid."""
        self._check_pinnable()
        return self._call(calls.unpin(experts))

    def reattach(self, timeout_seconds: float) -> None:
        """Attaches again, to whatever daemon answers, within ``timeout_seconds``.

        Pins and hints of the old session are gone; the counters go on. Raises
        UnavailableError if none answers in time, NotFoundError if the daemon has no such
        model, PreconditionError if it is no longer the same.
        """
        previous = self._begin_reattach()
        deadline = time.monotonic() + timeout_seconds
        delays = retry_delays(timeout_seconds)
        while True:
            left = max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic())
            try:
                attachment, model = self._begin(self.model.name, left, self._cache, previous)
                break
            except NOT_YET as error:
                delay = next(delays, None)
                if delay is None:
                    raise UnavailableError(
                        f"No daemon to reattach to within {timeout_seconds:g} s. {error}"
                    ) from None
            time.sleep(delay)
        self._finish_reattach(attachment, model)

    def detach(self) -> None:
        """Ends the session; a second call does nothing.

        A lease still held is lost by it, and says so when it is released.
        """
        self._detached = True
        self._end()

    def _acquire_missing(
        self,
        layer: int,
        experts: Sequence[int],
        missed: set[int],
        timeout_seconds: float | None,
        *,
        in_arena: bool = False,
        in_waves: bool = False,
    ) -> Lease:
        """Fetches them; the entries in ``missed`` were not resident."""
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        for _ in range(MAX_FETCHES):
            number = self._mapping.begin_fetch()
            try:
                left = deadline - time.monotonic()
                places = self._bring(
                    layer, experts, number, left, in_arena=in_arena, in_waves=in_waves
                )
                lease = self._acquire_fetched(layer, experts, missed)
                while lease is None and places and self._read_pack(layer, places):
                    lease = self._acquire_fetched(layer, experts, missed)
            except BaseException:
                self._mapping.abandon_fetch()
                raise
            if lease is not None:
                return lease
        raise self._not_granted(layer)

    def _bring(
        self,
        layer: int,
        experts: Sequence[int],
        number: int,
        timeout_seconds: float,
        *,
        in_arena: bool,
        in_waves: bool,
    ) -> list[PackPlace]:
        """Has the daemon make them resident, or else reads copies of those that are missing.

        Where the daemon has no slots for them, it says where in the pack they are.
        """
        cache = self._cache
        if cache is None:
            call = self._fetch_call(layer, experts, number, in_arena=in_arena, in_waves=in_waves)
            return self._call(call, timeout_seconds)
        fill = self._fill(cache, layer, experts)
        try:
            chunks = self._rpc.stream(
                self._read_call(fill),
                timeout_seconds=timeout_seconds,
                metadata=self._attachment.credentials,
            )
            with closing(chunks):
                for chunk in chunks:
                    fill.feed(chunk)
        except SESSION_OVER as error:
            raise self._over(error) from None
        fill.finish()
        return []

    def _call(
        self, call: calls.Call[calls.ResultT], timeout_seconds: float | None = None
    ) -> calls.ResultT:
        try:
            return self._rpc.call(
                call,
                timeout_seconds=self._timeout_seconds
                if timeout_seconds is None
                else timeout_seconds,
                metadata=self._attachment.credentials,
            )
        except UnauthenticatedError:
            # Why the session is over says more than that its token is void.
            self._mapping.check_revoked()
            raise

    def _begin(
        self,
        model: str,
        timeout_seconds: float,
        old: RecordCache | None,
        previous: Mapping | None = None,
    ) -> tuple[Attachment | CopyAttachment, ModelInfo]:
        deadline = time.monotonic() + timeout_seconds
        reached = None
        if isinstance(self._address, UnixAddress):
            reached = greet(self._address.directory, model, timeout_seconds, previous)
        try:
            # The daemon has answered, so what its channel may still believe from the time
            # before it was there is wrong: wait for the connection rather than fail.
            info = self._rpc.call(
                calls.get_model(model),
                timeout_seconds=max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic()),
                metadata=() if reached is None else reached.credentials,
                wait_for_ready=reached is not None,
            )
            return attachment_for(reached, info, self._cache_bytes, old)
        except BaseException:
            if reached is not None:
                reached.close()
            raise

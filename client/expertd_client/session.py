"""The sync session."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from expertd.errors import CapacityError, DeadlineError, UnauthenticatedError, UnavailableError
from expertd.greeting import handshake
from expertd.handshake import Role
from expertd_client import calls
from expertd_client.attachment import Attachment
from expertd_client.base_session import (
    MAX_FETCHES,
    BaseSession,
    WaveSize,
    check_directory,
)
from expertd_client.endpoint import MIN_TIMEOUT_SECONDS, retry_delays
from expertd_client.lease import Lease
from expertd_client.model import ModelInfo
from expertd_client.rpc import Rpc


class Session(BaseSession):
    """One attached worker. A context manager that detaches."""

    def __init__(self, rpc: Rpc, directory: Path, model: str, timeout_seconds: float) -> None:
        self._rpc = rpc
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        super().__init__(*_begin(rpc, directory, model, timeout_seconds))

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def acquire(
        self, layer: int, experts: Sequence[int], *, timeout_seconds: float | None = None
    ) -> Lease:
        """Experts of one layer, resident and staying so until the lease is released.

        Those that are all resident cost no call; else all are fetched by one. A session has
        one lease at a time: acquiring with one in hand is a PreconditionError. Raises
        NotFoundError, CapacityError if more was asked for than can ever be resident at once
        (then see :meth:`waves`), RecordLostError, DeadlineError, and UnavailableError,
        IncarnationError or SessionLostError, after which :meth:`reattach` helps.
        """
        lease = self._acquire_resident(layer, experts)
        if lease is not None:
            return lease
        return self._acquire_missing(layer, experts, timeout_seconds)

    def waves(
        self, layer: int, experts: Sequence[int], *, timeout_seconds: float | None = None
    ) -> Iterator[Lease]:
        """``experts`` in consecutive runs, each a lease of as many as fit.

        Release each before taking the next. All at once if all are resident. The timeout is
        each wave's. Raises as :meth:`acquire` does.
        """
        size = WaveSize(self.model.max_fetch_records)
        start = 0
        while start < len(experts):
            lease = self._acquire_resident(layer, experts[start:])
            while lease is None:
                wave = experts[start : start + size.num_experts]
                try:
                    lease = self.acquire(layer, wave, timeout_seconds=timeout_seconds)
                except CapacityError as error:
                    size.shrink(error)
            start += len(lease.experts)
            yield lease

    def prefetch(self, experts: Sequence[tuple[int, int]], *, priority: int = 0) -> int:
        """Hints which (layer, expert) pairs are wanted next, likeliest first.

        Returns how many reads that caused. Costs no call if all are resident. A newer hint
        supersedes what an older one has not begun; it evicts nothing that a running step
        uses. Allowed while a lease is held.
        """
        absent = self._absent_of(experts)
        if not absent:
            return 0
        return self._call(calls.prefetch(absent, priority))

    def pin(self, experts: Sequence[tuple[int, int]]) -> int:
        """Keeps (layer, expert) pairs resident while the session lasts; how many it pinned."""
        self._mapping.check_attached()
        return self._call(calls.pin(experts))

    def unpin(self, experts: Sequence[tuple[int, int]] = ()) -> int:
        """Undoes :meth:`pin`, for all if none are named; how many it undid."""
        self._mapping.check_attached()
        return self._call(calls.unpin(experts))

    def reattach(self, timeout_seconds: float) -> None:
        """Attaches again, to whatever daemon answers, within ``timeout_seconds``.

        Pins and hints of the old session are gone; the counters go on. Raises
        UnavailableError if none answers in time, NotFoundError if the daemon has no such
        model, PreconditionError if it is no longer the same.
        """
        self._begin_reattach()
        deadline = time.monotonic() + timeout_seconds
        delays = retry_delays(timeout_seconds)
        while True:
            left = max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic())
            try:
                attachment, model = _begin(self._rpc, self._directory, self.model.name, left)
                break
            except (UnavailableError, DeadlineError) as error:
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
        self, layer: int, experts: Sequence[int], timeout_seconds: float | None
    ) -> Lease:
        missed = self._absent(layer, experts)
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        for _ in range(MAX_FETCHES):
            number = self._mapping.begin_fetch()
            try:
                self._call(
                    calls.fetch(layer, dict.fromkeys(experts), number), deadline - time.monotonic()
                )
            except BaseException:
                self._mapping.abandon_fetch()
                raise
            lease = self._acquire_fetched(layer, experts, missed)
            if lease is not None:
                return lease
        raise self._not_granted(layer)

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
    rpc: Rpc, directory: Path, model: str, timeout_seconds: float
) -> tuple[Attachment, ModelInfo]:
    deadline = time.monotonic() + timeout_seconds
    with handshake(directory, Role.WORKER, model, timeout_seconds) as greeting:
        attachment = Attachment(greeting)
    try:
        # The daemon has answered, so what its channel may still believe from the time
        # before it was there is wrong: wait for the connection rather than fail.
        info = rpc.call(
            calls.get_model(model),
            timeout_seconds=max(MIN_TIMEOUT_SECONDS, deadline - time.monotonic()),
            wait_for_ready=True,
        )
        check_directory(attachment, info)
    except BaseException:
        attachment.close()
        raise
    return attachment, info

"""How much the sessions of one user may keep from being evicted at once.

What a user keeps is what its sessions pin, what they have leased, and what their fetches under
way will lease; a record counts once. A fetch that can never fit is refused; one that must only
wait for leases of the user's other sessions waits, in the order of coming, before it asks for
room: so nobody else waits for it.
"""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from expertd.hosting.hosted_model import RecordKey
from expertd.hosting.hosted_session import HostedSession, UserTally
from expertstore.errors import CapacityError, SessionLostError
from expertstore.sizes import format_bytes

_PAUSE_SECONDS = 0.002


class Quotas:
    """``quotas`` in bytes by uid, ``default`` for all others, None: no limit.

    What is kept is counted as it changes (:meth:`kept_by`), so that a fetch costs the same however
    much its user has pinned. ``refresh`` takes in what sessions have released.
    """

    def __init__(
        self,
        quotas: Mapping[int, int],
        default: int | None,
        refresh: Callable[[], None],
        wait_seconds: float,
    ) -> None:
        self._quotas, self._default = quotas, default
        self._kept: weakref.WeakValueDictionary[int, UserTally] = weakref.WeakValueDictionary()
        self._refresh = refresh
        self._wait_seconds = wait_seconds
        self._turns: dict[int, asyncio.Lock] = {}

    def of(self, uid: int) -> int | None:
        """What that user may keep, in bytes."""
        return self._quotas.get(uid, self._default)

    def kept_by(self, uid: int) -> UserTally:
        """What the sessions of that user keep; to be given to each of them."""
        return self._kept.setdefault(uid, UserTally())

    @asynccontextmanager
    async def admitted(self, session: HostedSession, entries: Sequence[int]) -> AsyncIterator[None]:
        """Counts ``entries`` of the session's model as kept inside the ``with``.

        Waits until they may be. Raises :class:`CapacityError` if they never may, or not in time.
        """
        quota = self.of(session.uid)
        if quota is not None:
            asked = {RecordKey(session.model, entry) for entry in entries}
            self._check(session, quota, asked)
            try:
                async with (
                    asyncio.timeout(self._wait_seconds),
                    self._turns.setdefault(session.uid, asyncio.Lock()),
                ):
                    await self._wait(session, quota, asked)
            except TimeoutError:
                self._check(session, quota, asked, in_time=True)
        with session.asks(entries):
            yield

    async def _wait(self, session: HostedSession, quota: int, asked: set[RecordKey]) -> None:
        while self._exceeds(session, quota, asked):
            self._check(session, quota, asked)
            await asyncio.sleep(_PAUSE_SECONDS)
            self._refresh()
            if session.closed:
                raise SessionLostError("the session ended while it waited.")

    def _exceeds(self, session: HostedSession, quota: int, asked: set[RecordKey]) -> bool:
        kept = self.kept_by(session.uid).all
        new = [record for record in asked if record not in kept]
        return kept.num_bytes + _size(new) > quota

    def _check(
        self, session: HostedSession, quota: int, asked: set[RecordKey], *, in_time: bool = False
    ) -> None:
        """Raises if ``asked`` do not fit beside what no waiting will end.

        That is what is pinned, and what is leased to the session that asks; ``in_time``: whatever
        is kept, since there is no time left to wait.
        """
        kept = self.kept_by(session.uid)
        if in_time:
            held = kept.all.num_bytes
            new = {record for record in asked if record not in kept.all}
        else:
            leased = {record for record in session.leased if record not in kept.pinned}
            held = kept.pinned.num_bytes + _size(leased)
            new = {record for record in asked - leased if record not in kept.pinned}
        if held + _size(new) <= quota:
            return
        model = session.model
        most = max(0, quota - held) // model.max_record_bytes
        way_out = f"fetch in waves of {most}" if most else "unpin or release some first"
        raise CapacityError(
            f"the quota of uid {session.uid} is {format_bytes(quota)}, and its sessions keep "
            f"{format_bytes(held)}, of which {format_bytes(kept.pinned.num_bytes)} pinned: "
            f"{len(new)} more experts of {model.name}, {format_bytes(_size(new))}, exceed it; "
            f"{way_out}.",
            requested=len(new),
            available=most,
            unit="records",
        )


def _size(records: Collection[RecordKey]) -> int:
    return sum(model.record_bytes(entry) for model, entry in records)

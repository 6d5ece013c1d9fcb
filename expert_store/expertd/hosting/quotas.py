"""How much the sessions of one user may keep from being evicted at once.

What a user keeps is what its sessions pin, what they have leased, and what their fetches under
way will lease; a record counts once. A fetch that can never fit is refused; one that must only
wait for leases of the user's other sessions waits, in the order of coming, before it asks for
room: so nobody else waits for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from expertd.errors import CapacityError, SessionLostError
from expertd.hosting.hosted_model import Record
from expertd.hosting.session import Session
from expertd.sizes import format_bytes

_PAUSE_SECONDS = 0.002


class Quotas:
    """``quotas`` in bytes by uid, ``default`` for all others, None: no limit.

    ``refresh`` takes in what sessions have released.
    """

    def __init__(
        self,
        quotas: Mapping[int, int],
        default: int | None,
        sessions: Mapping[str, Session],
        refresh: Callable[[], None],
        wait_seconds: float,
    ) -> None:
        self._quotas, self._default = quotas, default
        self._sessions = sessions
        self._refresh = refresh
        self._wait_seconds = wait_seconds
        self._turns: dict[int, asyncio.Lock] = {}

    def of(self, uid: int) -> int | None:
        """What that user may keep, in bytes."""
        return self._quotas.get(uid, self._default)

    def kept_bytes(self, uid: int) -> int:
        """What that user keeps."""
        return _size(record for session in self._of(uid) for record in session.kept)

    @asynccontextmanager
    async def admitted(self, session: Session, entries: Sequence[int]) -> AsyncIterator[None]:
        """Counts ``entries`` of the session's model as kept inside the ``with``.

        Waits until they may be. Raises :class:`CapacityError` if they never may, or not in time.
        """
        quota = self.of(session.uid)
        if quota is not None:
            asked = {Record(session.model, entry) for entry in entries}
            self._check(session, quota, asked, self._firmly_kept(session))
            try:
                async with (
                    asyncio.timeout(self._wait_seconds),
                    self._turns.setdefault(session.uid, asyncio.Lock()),
                ):
                    await self._wait(session, quota, asked)
            except TimeoutError:
                self._check(session, quota, asked, self._kept(session.uid))
        session.asked.append(entries)
        try:
            yield
        finally:
            session.asked.remove(entries)

    async def _wait(self, session: Session, quota: int, asked: set[Record]) -> None:
        while _size(self._kept(session.uid) | asked) > quota:
            self._check(session, quota, asked, self._firmly_kept(session))
            await asyncio.sleep(_PAUSE_SECONDS)
            self._refresh()
            if session.closed:
                raise SessionLostError("the session ended while it waited.")

    def _of(self, uid: int) -> list[Session]:
        sessions = self._sessions.values()
        return [session for session in sessions if session.is_worker and session.uid == uid]

    def _kept(self, uid: int) -> set[Record]:
        return {record for session in self._of(uid) for record in session.kept}

    def _firmly_kept(self, session: Session) -> set[Record]:
        """What no waiting will end: pins, and leases of the session that asks."""
        pinned = {record for other in self._of(session.uid) for record in other.pinned}
        return pinned | session.leased

    def _check(self, session: Session, quota: int, asked: set[Record], kept: set[Record]) -> None:
        new = asked - kept
        held = _size(kept)
        if held + _size(new) <= quota:
            return
        model = session.model
        most = max(0, quota - held) // model.max_record_bytes
        pins = _size(record for other in self._of(session.uid) for record in other.pinned)
        way_out = f"fetch in waves of {most}" if most else "unpin or release some first"
        raise CapacityError(
            f"the quota of uid {session.uid} is {format_bytes(quota)}, and its sessions keep "
            f"{format_bytes(held)}, of which {format_bytes(pins)} pinned: {len(new)} more experts "
            f"of {model.name}, {format_bytes(_size(new))}, exceed it; {way_out}.",
            requested=len(new),
            available=most,
            unit="records",
        )


def _size(records: Iterable[Record]) -> int:
    return sum(model.record_bytes(entry) for model, entry in {*records})

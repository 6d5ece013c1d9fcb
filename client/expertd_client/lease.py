"""A lease: records that stay where they are until it is released."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expertd_client.mapping import HoldState, Mapping
from expertd_client.record_cache import RecordCache
from expertstore.errors import PreconditionError, SessionLostError
from expertstore.shared.directory import PAGE_BYTES

if TYPE_CHECKING:
    from expertd_client.base_session import BaseSession

_PAGE_MASK = 0xFFFF_FFFF


class Lease:
    """Experts of one layer that may be read, where they lie in the arena.

    A context manager that releases. ``offsets`` are those of the records in the arena, in
    bytes, in the order of ``experts``. What :meth:`find` finds besides is held as long.
    """

    __slots__ = ("_mapping", "_released", "_session", "_views", "experts", "layer", "offsets")

    def __init__(
        self,
        session: "BaseSession",
        mapping: Mapping | RecordCache,
        layer: int | None,
        experts: tuple[int, ...],
        words: list[int],
    ) -> None:
        # Kept, so that a session nobody else refers to does not end beneath its lease.
        self._session = session
        self._mapping = mapping
        self._released = False
        self._views: list[memoryview] | None = None
        self.layer = layer
        self.experts = experts
        # directory.unpack_word, in place: this is the hit path.
        self.offsets = tuple([((word & _PAGE_MASK) - 1) * PAGE_BYTES for word in words])

    def __repr__(self) -> str:
        state = "released" if self._released else "held"
        return f"<Lease {state} layer={self.layer} experts={list(self.experts)}>"

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.release()
        except SessionLostError:
            # Outranks a failure of the block, which the lost bytes may have caused, but not
            # an interrupt or a cancellation.
            if kind is None or issubclass(kind, Exception):
                raise

    def find(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        """Those of ``experts`` that are resident, and where: their offsets in the arena.

        They stay there until this lease is released. Costs no call, and fetches nothing: for
        what is not found, release, and acquire it.
        """
        if self._released:
            raise PreconditionError("This lease is released; acquire the experts again.")
        found = self._session._find(layer, experts)
        return {expert: _offset(word) for expert, word in found.items()}

    def note(self, entries: Sequence[int]) -> None:
        """Counts uses of ``entries``, which the holder has found in the directory by itself."""
        self._session._note(entries)

    def check(self) -> None:
        """Raises SessionLostError if what was read until now may have changed beneath it."""
        self._mapping.check_revoked()

    @property
    def views(self) -> list[memoryview]:
        """The records, read-only and not copied; not to be read after the release."""
        if self._released:
            raise PreconditionError("This lease is released; acquire the experts again.")
        if self._views is None:
            if self._mapping.state is HoldState.CLOSED:
                raise PreconditionError("The session of this lease is detached; attach again.")
            self._views = []
            if self.layer is not None:
                size = self._session.model.layers[self.layer].layout.record_bytes
                arena = self._mapping.arena
                self._views = [arena[offset : offset + size] for offset in self.offsets]
        return self._views

    def release(self) -> None:
        """Gives the records back; a second call does nothing.

        Raises SessionLostError if they may have changed while they were held: what was
        computed from them must be thrown away; reattach, and repeat.
        """
        if self._released:
            return
        self._released = True
        if self._views is not None:
            _invalidate(self._views)
        self._mapping.release()


def _offset(word: int) -> int:
    return ((word & _PAGE_MASK) - 1) * PAGE_BYTES


def _invalidate(views: list[memoryview]) -> None:
    """Makes a late use of ``views`` an error rather than a read of someone else's bytes."""
    for view in views:
        try:
            view.release()
        except BufferError:
            # An array or tensor was made of it; that one cannot be taken back.
            continue

"""What the experts need from a session: the seam between the worker and the store.

:class:`expertd_client.Session` is the real one; tests put another in its place.
"""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable


class ExpertLease(Protocol):
    """Records that stay where they are until the lease is released."""

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that it covers."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where their records lie, in bytes from the arena's beginning."""

    def __enter__(self) -> object:
        """Begins a block at whose end the lease is released."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Releases it. Raises SessionLostError if the bytes may have changed meanwhile."""


class ExpertSource(Protocol):
    """Where a model's experts come from."""

    @property
    def arena_address(self) -> int:
        """Of the arena's read-only mapping in this process."""

    @property
    def arena_bytes(self) -> int:
        """Size of the arena."""

    @property
    def mapped_bytes(self) -> int:
        """How far from :attr:`arena_address` on the offsets of leases may lead.

        Behind the arena are this process's own copies of records that had no slot in it.
        """

    @property
    def connected(self) -> bool:
        """Whether the daemon that the session attached to still holds it."""

    @property
    def max_wave(self) -> int:
        """How many experts can be leased at once, as was told when it attached."""

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[ExpertLease]:
        """Leases that cover ``experts`` in order; each is released before the next is taken."""

    def reattach(self, timeout_seconds: float) -> None:
        """Attaches to whichever daemon answers in time; UnavailableError if none does."""


class HeldLease(ExpertLease, Protocol):
    """A lease that finds more while it is held; see :class:`expertd_client.lease.Lease`."""

    def find(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        """Those of ``experts`` that are resident, and their offsets in the arena."""

    def check(self) -> None:
        """Raises SessionLostError if what was read until now may have changed."""

    def release(self) -> None:
        """Ends it. Raises SessionLostError if the bytes may have changed."""


class DirectoryLease(Protocol):
    """A lease whose holder reads the directory by itself."""

    def note(self, entries: Sequence[int]) -> None:
        """Counts uses of these entries of the directory."""

    def release(self) -> None:
        """Ends it. Raises SessionLostError if the bytes may have changed."""


@runtime_checkable
class DirectorySource(Protocol):
    """A source whose directory its user may read, while it holds a lease."""

    @property
    def directory_address(self) -> int:
        """Of the directory's first entry in this process; 0 if there is no directory."""

    def first_entry(self, layer: int) -> int:
        """The number of the directory's entry of a layer's expert 0; the others follow."""

    def hold(self) -> DirectoryLease:
        """A lease of nothing yet."""


class HeldSource(ExpertSource, Protocol):
    """A source from which a device copies, over the layers of a step."""

    @property
    def directory_address(self) -> int:
        """Of the directory's first entry in this process; 0 if there is no directory."""

    def hold(self) -> HeldLease:
        """A lease of nothing yet."""

    def waves(
        self, layer: int, experts: Sequence[int], *, in_arena: bool = False
    ) -> Iterator[HeldLease]:
        """As :meth:`ExpertSource.waves`; ``in_arena``: none may be a copy of this process's."""

    def hint(
        self, experts: Sequence[tuple[int, int]], needed: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Says which (layer, expert) pairs are wanted next, likeliest first; waits for nothing."""

    def before_unmapping(self, call: Callable[[], None]) -> None:
        """Has ``call`` called before the arena that is mapped now is unmapped."""

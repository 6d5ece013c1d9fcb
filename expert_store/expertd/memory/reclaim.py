"""When the bytes of an evicted record may be used again: the daemon's side of the epoch rule.

Quiescent-state-based reclamation, one epoch per model (``docs/protocol.md`` has the rule
and why it needs no store-load fence). Pure bookkeeping: the caller withdraws the directory
words, advances the epoch, and reads the session pages.
"""

from collections import deque
from collections.abc import Iterable

from expertd.memory.extents import Extent


class Reclaimer:
    """The extents that were withdrawn but may still have readers, oldest first."""

    def __init__(self) -> None:
        self._retired: deque[tuple[int, Extent]] = deque()
        self.bytes_retired = 0

    def __repr__(self) -> str:
        oldest = self._retired[0][0] if self._retired else "-"
        return f"Reclaimer({self.bytes_retired} bytes, oldest epoch {oldest})"

    @property
    def extents(self) -> tuple[Extent, ...]:
        """What is retired."""
        return tuple(extent for _, extent in self._retired)

    def retire(self, epoch: int, extents: Iterable[Extent]) -> None:
        """Takes extents whose words were withdrawn before ``epoch`` began."""
        for extent in extents:
            self._retired.append((epoch, extent))
            self.bytes_retired += extent.num_bytes

    def waits_for(self, published: int) -> bool:
        """Whether a session that has published ``published`` holds anything back."""
        return bool(self._retired) and published < self._retired[-1][0]

    def collect(self, published: Iterable[int]) -> list[Extent]:
        """The extents that no session can still read, given the epochs of all live ones."""
        oldest = min(published, default=None)
        free = []
        while self._retired and (oldest is None or oldest >= self._retired[0][0]):
            extent = self._retired.popleft()[1]
            self.bytes_retired -= extent.num_bytes
            free.append(extent)
        return free

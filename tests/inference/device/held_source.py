"""A source that devices copy from, without a daemon: what is released is garbage at once."""

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from expertstore.errors import SessionLostError
from expertstore.shared.directory import pack_word
from tests.inference.pack_source import GARBAGE, PackSource


@dataclass
class HeldPackSource(PackSource):
    """A :class:`PackSource` whose records move whenever nobody holds them.

    ``absent`` are not in RAM until they are fetched; with ``forgetful`` they are not once they
    have been released either.
    """

    absent: set[tuple[int, int]] = field(default_factory=set)
    forgetful: bool = False
    copies: bool = False
    hinted: list[tuple[int, int]] = field(default_factory=list)
    num_holds: int = 0
    lost: bool = False
    at_unmapping: list[Callable[[], None]] = field(default_factory=list)
    lease: "HeldPackLease | None" = None

    def __post_init__(self) -> None:
        self._random = random.Random(1)
        self._brought: set[tuple[int, int]] = set()
        super().__post_init__()

    @property
    def directory_address(self) -> int:
        """Of words as the daemon's directory has them, of the records' places since the last hold.

        0 if there are ``copies`` instead.
        """
        return 0 if self.copies else ctypes.addressof(self._words)

    def hold(self) -> "HeldPackLease":
        self.fail()
        return self._take((), ())

    def waves(  # type: ignore[override] # what it yields is no PackLease
        self, layer: int, experts: Sequence[int], *, in_arena: bool = False
    ) -> Iterator["HeldPackLease"]:
        for start in range(0, len(experts), self.wave):
            self.fail()
            wave = tuple(experts[start : start + self.wave])
            self.waves_taken.append((layer, wave))
            self._brought |= {(layer, expert) for expert in wave} & self.absent
            lease = self._take(wave, (), layer)
            yield lease

    def hint(
        self, experts: Sequence[tuple[int, int]], needed: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.hinted += experts

    def before_unmapping(self, call: Callable[[], None]) -> None:
        self.at_unmapping.append(call)

    def reattach(self, timeout_seconds: float) -> None:
        assert self.lease is None, "attached anew while a lease was held"
        self.unmap()
        self.lost = False
        super().reattach(timeout_seconds)

    def unmap(self) -> None:
        """As when a daemon has been gone for a while."""
        while self.at_unmapping:
            self.at_unmapping.pop()()

    def revoke(self) -> None:
        """The session is cut off, and its bytes are reused."""
        self.lost = True
        self.memory[:] = GARBAGE * len(self.memory)

    def offset(self, layer: int, expert: int) -> int | None:
        key = (layer, expert)
        return None if key in self.absent and key not in self._brought else self._offsets[key]

    def released(self) -> None:
        self.lease = None
        if self.forgetful:
            self._brought.clear()
        self.memory[:] = GARBAGE * len(self.memory)

    def _take(
        self, experts: tuple[int, ...], offsets: tuple[int, ...], layer: int = 0
    ) -> "HeldPackLease":
        assert self.lease is None, "a lease was taken while another was held"
        if self.lost:
            raise SessionLostError("The bytes have changed.")
        self.num_holds += 1
        self._scatter()
        offsets = tuple(self._offsets[layer, expert] for expert in experts)
        self.lease = HeldPackLease(self, experts, offsets)
        return self.lease

    def _map(self) -> None:
        super()._map()
        self._words = (ctypes.c_uint64 * self.manifest.num_experts)()
        self._records = {}
        for layer in self.manifest.layers:
            size = self.manifest.layouts[layer.layout].record_bytes
            for expert in range(layer.num_experts):
                offset = self._offsets[layer.layer, expert]
                self._records[layer.layer, expert] = self.memory[offset : offset + size]

    def _scatter(self) -> None:
        """Puts the records somewhere else."""
        keys = list(self._records)
        self._random.shuffle(keys)
        place = 0
        for key in keys:
            self._offsets[key] = place
            end = place + len(self._records[key])
            self.memory[place:end] = self._records[key]
            place = end
        for layer, first in zip(self.manifest.layers, self.manifest.first_entries, strict=True):
            for expert in range(layer.num_experts):
                offset = self.offset(layer.layer, expert)
                word = 0 if offset is None else pack_word(offset, self.num_holds)
                self._words[first + expert] = word


@dataclass
class HeldPackLease:
    """A lease of a :class:`HeldPackSource`."""

    source: HeldPackSource
    experts: tuple[int, ...]
    offsets: tuple[int, ...]

    def find(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        assert self.source.lease is self, "looked up after the release"
        places = {expert: self.source.offset(layer, expert) for expert in experts}
        return {expert: place for expert, place in places.items() if place is not None}

    def check(self) -> None:
        if self.source.lost:
            raise SessionLostError("The bytes have changed.")

    def release(self) -> None:
        if self.source.lease is not self:
            return
        self.source.released()
        self.check()

    def __enter__(self) -> "HeldPackLease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.release()

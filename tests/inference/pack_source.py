"""An ExpertSource that needs no daemon: a pack's records in private memory, and failures."""

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from expertstore.errors import SessionLostError
from expertstore.pack.manifest import Manifest, read_manifest

GARBAGE = b"\x7f"


@dataclass
class PackSource:
    """All experts of ``pack``, in waves of ``wave`` experts.

    ``fail`` is called before each lease and may raise; of leases whose number (from 0) is in
    ``revoked``, the bytes are overwritten while they are held.
    """

    pack: Path
    wave: int = 1 << 20
    fail: Callable[[], None] = lambda: None
    revoked: frozenset[int] = frozenset()
    connected: bool = True
    waves_taken: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    num_reattached: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        self.manifest: Manifest = read_manifest(self.pack).manifest
        self._offsets: dict[tuple[int, int], int] = {}
        self._map()

    @property
    def max_wave(self) -> int:
        return self.wave

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator["PackLease"]:
        """Leases of at most ``wave`` experts."""
        assert list(experts) == sorted(set(experts))
        for start in range(0, len(experts), self.wave):
            self.fail()
            assert not self.held, "a lease was taken while another was held"
            wave = tuple(experts[start : start + self.wave])
            number = len(self.waves_taken)
            self.waves_taken.append((layer, wave))
            lease = PackLease(
                self, wave, tuple(self._offsets[layer, e] for e in wave), number in self.revoked
            )
            if lease.revoked:
                self.memory[:] = GARBAGE * len(self.memory)
            self.held = True
            yield lease

    def reattach(self, timeout_seconds: float) -> None:
        """Maps the records at another address, in another order."""
        self.num_reattached += 1
        self.connected = True
        self._map()

    def _map(self) -> None:
        records = {}
        for layer in self.manifest.layers:
            size = self.manifest.layouts[layer.layout].record_bytes
            for expert in range(layer.num_experts):
                name = self.manifest.files[layer.files[expert]].name
                with (self.pack / name).open("rb") as file:
                    file.seek(layer.offsets[expert])
                    records[layer.layer, expert] = file.read(size)
        self.memory = mmap.mmap(-1, sum(map(len, records.values())))
        self.arena_bytes = self.mapped_bytes = len(self.memory)
        self.arena_address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._offsets.clear()
        for key in sorted(records, reverse=bool(self.num_reattached % 2)):
            self._offsets[key] = self.memory.tell()
            self.memory.write(records[key])


@dataclass
class PackLease:
    """A lease of a :class:`PackSource`."""

    source: PackSource
    experts: tuple[int, ...]
    offsets: tuple[int, ...]
    revoked: bool

    def __enter__(self) -> "PackLease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.source.held = False
        if self.revoked:
            raise SessionLostError("The bytes have changed.")

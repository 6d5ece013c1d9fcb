"""A model that the daemon holds: which of its records are resident, and who uses them."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertd.disk.loader import ReadJob
from expertd.disk.opening import DEFAULT_DISK, DiskChoice
from expertd.disk.record_file import RecordFile
from expertd.histogram import Histogram
from expertd.hosting.patience import annex_bytes
from expertd.hosting.tally import Tally
from expertd.hosting.touch_watch import TouchWatch
from expertd.memory.extents import Extent
from expertd.memory.memfd import SharedMemory
from expertd.memory.reclaim import Reclaimer
from expertd.residency import DEFAULT_POLICY, Entries, make_policy
from expertd.settings.limits import NO_LIMITS, ModelLimits, pinned_entries
from expertd.tables.hosted_table import HostedTable
from expertstore.errors import NotFoundError
from expertstore.pack.manifest import Fingerprinted, Layer
from expertstore.shared.directory import Directory, pack_word, unpack_word

MAX_LEARNED_TOUCHES = 16384
"""At one look, of all sessions of a model together: of more the newest tell as much, and one
that claims millions must not take the event loop from the others."""


class ModelState(Enum):
    """Where a model is in its life."""

    SERVING = auto()
    UNLOADING = auto()


class DiskPlace(NamedTuple):
    """Where a record lies on disk."""

    file: RecordFile
    offset: int
    checksum: str


class RecordKey(NamedTuple):
    """One expert's record of a model."""

    model: "HostedModel"
    entry: int


@dataclass(eq=False)
class Load:
    """A record on its way into the arena; ``done`` gets None or what is wrong with it."""

    entry: int
    extent: Extent
    hinted: bool
    done: asyncio.Future[str | None]
    job: ReadJob


@dataclass
class Counters:
    """What happened to a model since it was loaded.

    All but ``host_hits`` only grow; that one may drop by a worker's last few accesses, when
    their misses are seen later than they are (:meth:`.hosted_session.HostedSession.refresh`).
    """

    host_hits: int = 0
    nvme_misses: int = 0
    nvme_bytes_read: int = 0
    evictions: int = 0
    moves: int = 0
    records_lost: int = 0
    adopted_records: int = 0
    adopted_bytes: int = 0
    dropped_records: int = 0
    prefetch_queued: int = 0
    prefetch_withdrawn: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    records_in_pack: int = 0
    """Fetched ones that a worker was sent to the pack for, since no slot was to be had."""
    records_damaged: int = 0
    """In RAM; dropped, and read again."""
    fetch_seconds: Histogram = field(default_factory=Histogram)
    """From request to grant; refused ones do not count."""
    read_seconds: Histogram = field(default_factory=Histogram)
    """Of one record, with its verification, without the wait for a loader thread."""

    @property
    def prefetch_issued(self) -> int:
        """Reads that hints have started, or still will."""
        return self.prefetch_queued - self.prefetch_withdrawn


class HostedModel:
    """Bookkeeping of one model, without I/O of its own.

    An entry is an expert's index in the directory: layers in order, experts in order.
    ``memory`` is that directory, formatted; the model closes it.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        pack: Fingerprinted,
        files: Sequence[RecordFile],
        memory: SharedMemory,
        policy: str = DEFAULT_POLICY,
        limits: ModelLimits = NO_LIMITS,
        disk: DiskChoice = DEFAULT_DISK,
    ) -> None:
        self.limits, self.disk = limits, disk
        self.name, self.path, self.files = name, path, files
        self.tables: Sequence[HostedTable] = ()
        """In the manifest's order; the store opens and closes them."""
        self.manifest, self.fingerprint = pack.manifest, pack.fingerprint
        self.state = ModelState.SERVING
        self.counters = Counters()
        self.reclaimer = Reclaimer()
        self.loads: dict[int, Load] = {}
        self.num_sessions = 0
        self.watches: list[TouchWatch] = []
        self.num_reads = 0
        self._rows: dict[int, tuple[Layer, int]] = {}
        self._places: list[DiskPlace] = []
        self._record_bytes: list[int] = []
        self._experts: list[tuple[int, int]] = []
        for layer in self.manifest.layers:
            self._rows[layer.layer] = (layer, len(self._places))
            size = self.manifest.layouts[layer.layout].record_bytes
            for expert in range(layer.num_experts):
                file = files[layer.files[expert]]
                place = DiskPlace(file, layer.offsets[expert], layer.checksums[expert])
                self._places.append(place)
                self._record_bytes.append(size)
                self._experts.append((layer.layer, expert))
        self.num_entries = len(self._places)
        self.max_record_bytes = max(self._record_bytes)
        self.touches_per_token = sum(layer.experts_per_token for layer in self.manifest.layers)
        layers = self.manifest.layers
        sizes = [self.manifest.layouts[layer.layout].record_bytes for layer in layers]
        self.annex_bytes = annex_bytes(
            [
                (size, layer.num_experts, layer.experts_per_token)
                for size, layer in zip(sizes, layers, strict=True)
            ]
        )
        """What its workers may use of their own memory for records that have no slot."""
        self.heat = make_policy(
            policy,
            [layer.num_experts for layer in layers],
            [layer.experts_per_token for layer in layers],
        )
        self.memory = memory
        self.directory = Directory(memory.view.cast("Q"))
        self._extents: list[Extent | None] = [None] * self.num_entries
        self._generation = 0
        self._resident = np.zeros(self.num_entries, np.bool_)
        # Of resident records: what eviction looks at, for many at once.
        self._offsets = np.zeros(self.num_entries, np.int64)
        self._lengths = np.array(self._record_bytes, np.int64)
        self._holds = np.zeros(self.num_entries, np.int64)
        self._unused_hint = np.zeros(self.num_entries, np.bool_)
        self.pinned = Tally(self.record_bytes)
        """Entries that the model itself or its sessions pin, resident or not."""
        self.pins = set(pinned_entries(limits.pins, self.manifest, name))
        """Those that the model itself pins."""
        self.hold_pinned(self.pins)

    def __repr__(self) -> str:
        return (
            f"HostedModel({self.name}, {self.state.name}, {self.num_resident} of "
            f"{self.num_entries} resident, {len(self.loads)} loading, {self.reclaimer})"
        )

    @property
    def num_resident(self) -> int:
        """Records that workers can see."""
        return int(self._resident.sum())

    @property
    def resident_mask(self) -> npt.NDArray[np.bool_]:
        """For each entry, whether workers can see the record."""
        return self._resident

    @property
    def resident_bytes(self) -> int:
        """Their size."""
        return int(self._lengths[self._resident].sum())

    @property
    def arena_bytes(self) -> int:
        """What it occupies: records that workers can see, come and may still be reading."""
        loading = sum(load.extent.num_bytes for load in self.loads.values())
        return self.resident_bytes + loading + self.reclaimer.bytes_retired

    @property
    def minimum_bytes(self) -> int:
        """What other models' needs leave it, as long as it serves."""
        return 0 if self.state is ModelState.UNLOADING else self.limits.min_bytes

    @property
    def guarded_bytes(self) -> int:
        """What its minimum keeps from other models."""
        if self.state is ModelState.UNLOADING:
            return 0
        return self.limits.guarded_bytes(self.manifest)

    @property
    def is_in_use(self) -> bool:
        """Whether arena or files are still needed, by readers or by reads under way."""
        return bool(
            self.loads or self.num_reads or self.num_resident or self.reclaimer.bytes_retired
        )

    def first_entry(self, layer: int) -> int:
        """The entry of the layer's first expert."""
        return self._rows[layer][1]

    def entry(self, layer: int, expert: int) -> int:
        """The entry of an expert. Raises :class:`NotFoundError`."""
        row = self._rows.get(layer)
        if row is None:
            raise NotFoundError(f"{self.name} has no MoE layer {layer}.")
        if not 0 <= expert < row[0].num_experts:
            raise NotFoundError(
                f"{self.name} has no expert {expert} in layer {layer}: it has {row[0].num_experts}."
            )
        return row[1] + expert

    def check_entries(self, entries: Sequence[int]) -> Sequence[int]:
        """``entries``, if the model has them all. Raises :class:`NotFoundError`."""
        if entries and max(entries) >= self.num_entries:
            raise NotFoundError(f"{self.name} has no expert of entry {max(entries)}.")
        return entries

    def expert(self, entry: int) -> tuple[int, int]:
        """The (layer, expert) of an entry."""
        return self._experts[entry]

    def table(self, number: int) -> HostedTable:
        """One of its tables. Raises :class:`NotFoundError`."""
        if number >= len(self.tables):
            raise NotFoundError(f"{self.name} has no table {number}: it has {len(self.tables)}.")
        return self.tables[number]

    def place(self, entry: int) -> DiskPlace:
        """Where the entry's record lies on disk."""
        return self._places[entry]

    def record_bytes(self, entry: int) -> int:
        """Size of the entry's record."""
        return self._record_bytes[entry]

    def extent(self, entry: int) -> Extent | None:
        """Where the record lies in the arena, None unless it is resident."""
        return self._extents[entry] if self._resident[entry] else None

    def placed(self, entry: int) -> Extent | None:
        """Where the record lies or is being read to."""
        load = self.loads.get(entry)
        return load.extent if load is not None else self._extents[entry]

    def places_of(self, entries: Entries) -> tuple[Entries, Entries]:
        """Offsets and sizes, in bytes, of resident records."""
        return self._offsets[entries], self._lengths[entries]

    def num_holds(self, entry: int) -> int:
        """How many holds keep the record."""
        return int(self._holds[entry])

    def is_resident(self, entry: int) -> bool:
        """Whether workers can see the record."""
        return bool(self._resident[entry])

    def hold(self, entries: Iterable[int]) -> None:
        """Keeps records from being evicted, once more each."""
        for entry in entries:
            self._holds[entry] += 1

    def unhold(self, entries: Iterable[int]) -> None:
        """Takes back one hold of each."""
        for entry in entries:
            self._holds[entry] -= 1

    def hold_pinned(self, entries: Collection[int]) -> None:
        """Holds records until :meth:`unhold_pinned`, and counts them as pinned."""
        self.hold(entries)
        self.pinned.add(entries)

    def unhold_pinned(self, entries: Collection[int]) -> None:
        """Takes back one :meth:`hold_pinned` of each."""
        self.unhold(entries)
        self.pinned.remove(entries)

    def resident_from(self, start: int, most: int) -> list[int]:
        """The first ``most`` resident entries that are not below ``start``."""
        found: list[int] = (start + np.flatnonzero(self._resident[start:])[:most]).tolist()
        return found

    def unpin(self, entries: Iterable[int]) -> None:
        """Gives up pins of the model itself; those not pinned are ignored."""
        unpinned = self.pins.intersection(entries)
        self.pins -= unpinned
        self.unhold_pinned(unpinned)

    def evictable(self) -> Entries:
        """Resident records that nobody holds."""
        return np.flatnonzero(self._resident & (self._holds == 0))

    def held(self) -> Entries:
        """Resident records that somebody holds."""
        return np.flatnonzero(self._resident & (self._holds > 0))

    def arrive(self, load: Load) -> None:
        """A verified record becomes visible."""
        del self.loads[load.entry]
        self._resident[load.entry] = True
        self._unused_hint[load.entry] = load.hinted
        if load.hinted:
            self.heat.expect(load.entry)
        self._publish(load.entry, load.extent)

    def move(self, entry: int, target: Extent) -> None:
        """A resident record is now in ``target``, too: its old extent goes to the reclaimer.

        Who found the record there may go on reading, so this is an eviction of the old bytes
        in all but that the directory's word never is 0.
        """
        source = self._extents[entry]
        assert source is not None
        self._publish(entry, target)
        self.counters.moves += 1
        self.reclaimer.retire(self.directory.advance_epoch(), [source])

    def adopt(self, kept: Mapping[int, Extent], dropped: Sequence[int]) -> None:
        """Takes over a directory as an earlier daemon left it, before anybody attaches.

        ``kept`` are verified and stay where they are; the words of ``dropped`` led astray.
        """
        for entry in dropped:
            self.directory.withdraw(entry)
        if dropped:
            self.directory.advance_epoch()
        for entry, extent in kept.items():
            location = unpack_word(self.directory.word(entry))
            assert location is not None
            self._generation = max(self._generation, location.generation)
            self._extents[entry] = extent
            self._offsets[entry] = extent.offset
            self._resident[entry] = True
        self.counters.adopted_records = len(kept)
        self.counters.adopted_bytes = self.resident_bytes
        self.counters.dropped_records = len(dropped)

    def evict(self, entries: Sequence[int]) -> None:
        """Withdraws resident records; their extents go to the reclaimer."""
        extents = []
        for entry in entries:
            self.directory.withdraw(entry)
            extent = self._extents[entry]
            assert extent is not None
            extents.append(extent)
            self._extents[entry] = None
            self._resident[entry] = False
            self.counters.prefetch_wasted += bool(self._unused_hint[entry])
            self._unused_hint[entry] = False
        self.counters.evictions += len(extents)
        self.reclaimer.retire(self.directory.advance_epoch(), extents)

    def touched(
        self, entries: Entries, num_touches: int, num_misses: int, session: int = 0
    ) -> None:
        """Takes in what a worker accessed: in-range entries, and the totals to count."""
        learned = MAX_LEARNED_TOUCHES // max(1, self.num_sessions)
        self.heat.touch(entries[-learned:], session)
        for watch in self.watches:
            watch.offer(session, entries, num_touches - len(entries))
        self.counters.host_hits += num_touches - num_misses
        self.counters.nvme_misses += num_misses
        used = entries[self._unused_hint[entries]]
        self.counters.prefetch_useful += len(np.unique(used))
        self._unused_hint[used] = False

    def _publish(self, entry: int, extent: Extent) -> None:
        self._generation += 1
        self._extents[entry] = extent
        self._offsets[entry] = extent.offset
        self.directory.publish(entry, pack_word(extent.offset, self._generation))

    def close(self, free: Callable[[Extent], None]) -> None:
        """Gives everything back; call when no session and no load is left."""
        for entry in np.flatnonzero(self._resident):
            extent = self._extents[entry]
            assert extent is not None
            free(extent)
        for extent in self.reclaimer.collect(()):
            free(extent)
        self._resident[:] = False
        for watch in self.watches:
            watch.close()
        for file in self.files:
            file.close()
        del self.directory
        self.memory.close()

"""Records in this process's own memory, for sessions that cannot share the daemon's.

To a session it is what :class:`~expertd_client.mapping.Mapping` is: it says which entries are
there, holds them for a lease, and has the bytes. Nobody else reads or moves them, so holding
needs no epoch; when a record must make room, it is the one that was used longest ago.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence

from expertd_client.arena_mapping import address_of
from expertd_client.mapping import HoldState, state_error
from expertd_client.model import ModelInfo, MoeLayer
from expertd_client.record import RecordAssembler
from expertstore.errors import CapacityError, InvalidInputError, PreconditionError, RecordLostError
from expertstore.shared.directory import ABSENT, PAGE_BYTES, pack_word
from expertstore.sizes import format_bytes, size_to_give
from expertstore.v1 import expert_store_pb2 as pb

_OVER = (HoldState.LOST, HoldState.CLOSED, HoldState.FORKED)


class RecordCache:
    """At most ``num_bytes`` of records of one model, in slots of its largest record's size."""

    def __init__(self, model: ModelInfo, num_bytes: int) -> None:
        """Raises InvalidInputError if a layer's working set does not fit, MemoryError."""
        self.fingerprint = model.fingerprint
        self._slot_bytes = -(-model.record_bytes // PAGE_BYTES) * PAGE_BYTES
        self.num_slots = min(num_bytes // self._slot_bytes, model.num_experts)
        needed = max(layer.experts_per_token for layer in model.layers.values())
        if self.num_slots < needed:
            least = needed * self._slot_bytes
            raise InvalidInputError(
                f"cache_bytes is {format_bytes(num_bytes)}, and one token uses {needed} experts of "
                f"a layer of {model.name!r}, which take {format_bytes(least)}; give "
                f"{size_to_give(least)} or more."
            )
        self.arena_bytes = self.num_slots * self._slot_bytes
        # Private: a fork must not write into its parent's.
        memory = mmap.mmap(-1, self.arena_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._writable = memoryview(memory)
        self.arena = self._writable.toreadonly()
        self.arena_address = address_of(memory)
        self.mapped_bytes = self.arena_bytes
        self.copies: dict[int, int] = {}
        self.num_entries = model.num_experts
        self._slots: OrderedDict[int, int] = OrderedDict()  # by entry, longest unused first
        self._free = list(range(self.num_slots))
        self._before_unmapping: list[Callable[[], None]] = []
        self._num_fetches = 0
        self._state = HoldState.IDLE

    def __repr__(self) -> str:
        return f"<RecordCache {self._state.name.lower()} {len(self._slots)} of {self.num_slots}>"

    @property
    def state(self) -> HoldState:
        """What the session is doing."""
        return self._state

    def check_attached(self) -> None:
        """Raises if the session is over: PreconditionError."""
        if self._state in _OVER:
            raise state_error(self._state)

    def check_revoked(self) -> None:
        """As :meth:`check_attached`: nobody revokes what is ours."""
        self.check_attached()

    def try_hold(self, entries: Sequence[int], expected: HoldState = HoldState.IDLE) -> list[int]:
        """Starts holding if all ``entries`` are here; directory words of where, or ABSENT."""
        if self._state is not expected:
            raise state_error(self._state)
        words = self._words(entries)
        if ABSENT not in words:
            self._state = HoldState.HOLDING
        return words

    def look_up(self, entries: Sequence[int]) -> list[int]:
        """Further directory words while holding; ABSENT of those that are not here."""
        if self._state is not HoldState.HOLDING:
            self.check_attached()
            raise PreconditionError("This session holds no lease; hold one to look experts up.")
        return self._words(entries)

    def _words(self, entries: Sequence[int]) -> list[int]:
        slots = [self._slots.get(entry) for entry in entries]
        return [ABSENT if slot is None else pack_word(slot * self._slot_bytes, 0) for slot in slots]

    def before_unmapping(self, call: Callable[[], None]) -> None:
        """Has ``call`` called before the memory goes."""
        self._before_unmapping.append(call)

    def absent(self, entries: Sequence[int]) -> set[int]:
        """Which of ``entries`` are not here."""
        return {entry for entry in entries if entry not in self._slots}

    def anything_absent(self) -> bool:
        """Whether any entry is not here."""
        return len(self._slots) < self.num_entries

    def touch(self, entries: Sequence[int], missed: Collection[int]) -> None:
        """Takes note of a use."""
        for entry in entries:
            self._slots.move_to_end(entry)

    def begin_fetch(self) -> int:
        """Before records are read."""
        if self._state is not HoldState.IDLE and self._state is not HoldState.FETCHING:
            raise state_error(self._state)
        self._state = HoldState.FETCHING
        self._num_fetches += 1
        return self._num_fetches

    def abandon_fetch(self) -> None:
        """After reading failed."""
        if self._state is HoldState.FETCHING:
            self._state = HoldState.IDLE

    def check_room(self, entries: Collection[int]) -> None:
        """Raises CapacityError if ``entries`` cannot be here all at once."""
        if len(entries) > self.num_slots:
            raise CapacityError(
                f"{len(entries)} experts do not fit into this client's cache, which holds "
                f"{self.num_slots}; acquire in waves, or give more cache_bytes.",
                requested=len(entries),
                available=self.num_slots,
                unit="records",
            )

    def put(self, entry: int, data: bytes, wanted: Collection[int]) -> None:
        """Keeps a verified record, at the cost of the one unused for longest and not wanted."""
        slot = self._slots.pop(entry, None)
        if slot is None and self._free:
            slot = self._free.pop()
        if slot is None:
            slot = self._slots.pop(next(each for each in self._slots if each not in wanted))
        start = slot * self._slot_bytes
        self._writable[start : start + len(data)] = data
        self._slots[entry] = slot

    def release(self) -> None:
        """Ends a lease."""
        if self._state is not HoldState.HOLDING:
            if self._state is HoldState.CLOSED:
                return  # the bytes are still what they were: views keep them
            raise state_error(self._state)
        self._state = HoldState.IDLE

    def close(self) -> None:
        """Lets go of the memory; views that were given out keep it."""
        self._state = HoldState.CLOSED
        while self._before_unmapping:
            self._before_unmapping.pop()()
        self._slots.clear()
        self._free.clear()
        self.arena = self._writable = memoryview(b"")

    def abandon_in_child(self) -> None:
        """After fork, in the child: the session is its parent's."""
        self._state = HoldState.FORKED


class CacheFill:
    """One Read of those of a layer's ``experts`` that are not in ``cache``."""

    def __init__(
        self, cache: RecordCache, layer: MoeLayer, experts: Iterable[int], entries: Sequence[int]
    ) -> None:
        """``entries`` are those of the experts. Raises CapacityError if they do not all fit."""
        self._cache, self._layer, self._wanted = cache, layer, frozenset(entries)
        cache.check_room(self._wanted)
        absent = cache.absent(entries)
        self.missing = [
            (layer.layer, expert)
            for expert in dict.fromkeys(experts)
            if layer.first_entry + expert in absent
        ]
        self._assembler = RecordAssembler(self.missing)

    def feed(self, chunk: pb.ReadResponse) -> None:
        """Takes the next chunk; what it completes is kept. Raises RecordLostError."""
        record = self._assembler.feed(chunk)
        if record is None:
            return
        if len(record.data) != self._layer.layout.record_bytes:
            raise RecordLostError(
                f"The record of expert {record.expert} of layer {record.layer} arrived with "
                f"{len(record.data)} bytes instead of {self._layer.layout.record_bytes}; run the "
                "same version on both sides.",
                experts=[(record.layer, record.expert)],
            )
        self._cache.put(self._layer.first_entry + record.expert, record.data, self._wanted)

    def finish(self) -> None:
        """After the last chunk. Raises RecordLostError if a record is missing."""
        self._assembler.finish()

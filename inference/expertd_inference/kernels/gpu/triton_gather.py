"""Misses without the host: the GPU looks its experts up, and copies those that it lacks.

Two kernels. :func:`resolve` (one program) finds the routed experts in the device's slot table,
chooses victims for those that are missing, and reads from the directory's words where in the
arena their records lie. :func:`gather` copies these records from the arena, which is mapped into
the device's address space, into the slots. Neither returns anything to the host, so both can be
part of a CUDA graph. Only a record that is not in RAM needs the host: it is noted in
``Resolution.noted``, the expert stays out of the slot table, and the step is to be run again once
the daemon has brought the record.

The words are those that the host has read after it began to hold (``docs/protocol.md``): a few
tens of kilobytes per step, where reading the shared directory itself would cost each layer a
round trip over the link.

The slots of a layer are chosen least recently used first. What this very call uses is stamped
before a victim is chosen, so nothing that it needs can be evicted by it.

Both run under Triton's interpreter, which reads host memory by address just as the GPU does.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertstore.shared.directory import PAGE_BYTES

MAX_ROUTED = 128
"""The most (token, position) pairs that one call resolves."""

COPIED, ABSENT = 1, 2
"""What a step notes of an entry: it was copied from the arena, or is not in it."""

_WORDS_PER_TURN = 2048
"""64-bit words that one program of gather copies at a time: 16 KiB, a whole DMA burst."""

_GATHER_PROGRAMS = 512
"""Enough reads in flight to fill the link, few enough that a call without misses ends at once."""


@dataclass(frozen=True)
class SlotTable:
    """Which expert is in which slot, on the device; entries are the directory's.

    ``slot_of``: int32 [num_entries], -1 where an expert has no slot. ``entry_in``: int32
    [num_slots], -1 where a slot is empty. ``stamp``: int64 [num_slots], the clock when a slot was
    last used; ``clock``: int64 [1], which every call advances.
    """

    slot_of: Tensor
    entry_in: Tensor
    stamp: Tensor
    clock: Tensor

    @classmethod
    def empty(cls, num_entries: int, num_slots: int, device: torch.device | str) -> "SlotTable":
        """A table of empty slots."""
        return cls(
            slot_of=torch.full((num_entries,), -1, dtype=torch.int32, device=device),
            entry_in=torch.full((num_slots,), -1, dtype=torch.int32, device=device),
            stamp=torch.zeros(num_slots, dtype=torch.int64, device=device),
            clock=torch.zeros(1, dtype=torch.int64, device=device),
        )

    def clear(self) -> None:
        """Forgets what the slots hold: they were written to by someone else."""
        self.slot_of.fill_(-1)
        self.entry_in.fill_(-1)
        self.stamp.zero_()


@dataclass(frozen=True)
class Resolution:
    """What one call of :func:`resolve` is to copy, and what a whole step has counted.

    ``source``: int64 [MAX_ROUTED], byte offsets in the arena, -1 where nothing is to be copied;
    ``target``: int32 [MAX_ROUTED], the slots. ``counts``: int64 [3]: hits, copies, and experts
    absent from RAM, over all calls since :meth:`begin_step`. ``noted``: int32 [num_entries],
    ``COPIED`` or ``ABSENT`` for each of those, else 0.
    """

    source: Tensor
    target: Tensor
    counts: Tensor
    noted: Tensor

    @classmethod
    def empty(cls, num_entries: int, device: torch.device | str) -> "Resolution":
        """Of no call yet."""
        return cls(
            source=torch.full((MAX_ROUTED,), -1, dtype=torch.int64, device=device),
            target=torch.zeros(MAX_ROUTED, dtype=torch.int32, device=device),
            counts=torch.zeros(3, dtype=torch.int64, device=device),
            noted=torch.zeros(num_entries, dtype=torch.int32, device=device),
        )

    def begin_step(self) -> None:
        """Counts from 0 again."""
        self.counts.zero_()
        self.noted.zero_()


@triton.jit
def _resolve(
    top_k_index,  # int [num_routed], on the device
    directory,  # int64 [num_entries]
    slot_of,  # int32 [num_entries]
    entry_in,  # int32 [num_slots]
    stamp,  # int64 [num_slots]
    clock,  # int64 [1]
    source,  # int64 [MAX_ROUTED]
    target,  # int32 [MAX_ROUTED]
    counts,  # int64 [3]
    noted,  # int32 [num_entries]
    num_routed,
    num_experts,
    first_entry,
    first_slot,
    num_slots,
    ROUTED: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    COPIED_NOTE: tl.constexpr,
    ABSENT_NOTE: tl.constexpr,
):
    now = tl.load(clock) + 1
    num_hits, num_copied, num_absent = tl.load(counts), tl.load(counts + 1), tl.load(counts + 2)
    given_up = num_absent > 0
    items = tl.arange(0, ROUTED)
    expert = tl.load(top_k_index + items, mask=items < num_routed, other=-1).to(tl.int32)
    # What is past the last expert means "none" where tokens are spread over devices.
    valid = (expert >= 0) & (expert < num_experts)
    expert = tl.where(valid, expert, -1)
    same = (expert[:, None] == expert[None, :]) & (items[None, :] < items[:, None])
    first = valid & (tl.sum(same.to(tl.int32), axis=1) == 0)
    entry = first_entry + expert
    slot = tl.load(slot_of + entry, mask=valid, other=-1)

    places = tl.arange(0, SLOTS)
    ours = places < num_slots
    # Slots beyond the layer's look as if just used: never the oldest.
    stamps = tl.load(stamp + first_slot + places, mask=ours, other=0x7FFFFFFFFFFFFFFF)
    holds = tl.load(entry_in + first_slot + places, mask=ours, other=-1)
    hit = (slot[:, None] == (first_slot + places)[None, :]) & valid[:, None]
    stamps = tl.where(tl.max(hit.to(tl.int32), axis=0) > 0, now, stamps)

    missing = first & (slot < 0) & (not given_up)
    word = tl.load(directory + entry, mask=missing, other=0)
    # Only the half that says where: a word that was read while it changed may have any other.
    page = word & 0xFFFFFFFF
    gone = missing & (page == 0)
    copied = missing & (page != 0)
    offset = (page - 1) * PAGE

    # All have loaded before any stores: warps may hold copies of one value, and run apart.
    tl.debug_barrier()
    for item in range(ROUTED):
        this = items == item
        wanted = tl.sum((copied & this).to(tl.int32), axis=0) > 0
        new = tl.sum(tl.where(this, entry, 0), axis=0)
        victim = tl.argmin(stamps, axis=0)
        chosen = wanted & (places == victim)
        old = tl.sum(tl.where(chosen, holds, 0), axis=0)
        tl.store(slot_of + old, -1, mask=wanted & (old >= 0))
        tl.store(slot_of + new, first_slot + victim, mask=wanted)
        holds = tl.where(chosen, new, holds)
        stamps = tl.where(chosen, now, stamps)
        from_where = tl.sum(tl.where(this, offset, 0), axis=0)
        tl.store(source + item, tl.where(wanted, from_where, -1))
        tl.store(target + item, first_slot + victim)

    tl.store(stamp + first_slot + places, stamps, mask=ours)
    tl.store(entry_in + first_slot + places, holds, mask=ours)
    tl.store(clock, now)
    tl.store(noted + entry, tl.where(gone, ABSENT_NOTE, COPIED_NOTE), mask=missing)
    tl.store(counts, num_hits + tl.sum((first & (slot >= 0)).to(tl.int64), axis=0))
    tl.store(counts + 1, num_copied + tl.sum(copied.to(tl.int64), axis=0))
    tl.store(counts + 2, num_absent + tl.sum(gone.to(tl.int64), axis=0))


@triton.jit
def _gather(
    source,  # int64 [MAX_ROUTED]
    target,  # int32 [MAX_ROUTED]
    arena,  # int64: the address at which the device sees the arena
    cache,  # int64 [num_slots, slot_words]
    record_words,
    slot_words,
    ITEMS: tl.constexpr,
    TURNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    for item in range(ITEMS):
        offset = tl.load(source + item)
        if offset >= 0:
            record = (arena + offset).to(tl.pointer_type(tl.int64))
            slot = cache + tl.load(target + item).to(tl.int64) * slot_words
            for turn in range(TURNS):
                words = (turn * tl.num_programs(0) + tl.program_id(0)) * WORDS + tl.arange(0, WORDS)
                inside = words < record_words
                # Not to be kept in the L2, which the experts' own kernel needs more.
                value = tl.load(record + words, mask=inside, eviction_policy="evict_first")
                tl.store(slot + words, value, mask=inside)


def resolve(
    top_k_index: Tensor,  # [T, k], integer, contiguous
    table: SlotTable,
    resolution: Resolution,
    *,
    directory: Tensor,  # int64 [num_entries]
    num_experts: int,
    first_entry: int,
    first_slot: int,
    num_slots: int,
) -> None:
    """Assigns slots ``first_slot`` and on, ``num_slots`` of them, to the routed experts of a layer.

    ``directory`` are its words as the host read them, ``first_entry`` is the layer's first. Once an
    expert was found absent from RAM, later calls of the step copy nothing: what was routed to is
    then garbage. Raises ValueError if the layer has fewer slots than the tokens may need.
    """
    num_routed = top_k_index.numel()
    if not 0 < num_routed <= MAX_ROUTED:
        raise ValueError(f"{num_routed} routed experts; 1 to {MAX_ROUTED} can be resolved at once")
    if num_slots < min(num_routed, num_experts):
        raise ValueError(f"{num_slots} slots do not hold what {num_routed} choices may need")
    if not top_k_index.is_contiguous():
        raise ValueError("the routing is not contiguous")
    # Triton launches on the current device, which is another thread's or worker's choice.
    with torch.cuda.device_of(top_k_index):
        _resolve[(1,)](
            top_k_index,
            directory,
            table.slot_of,
            table.entry_in,
            table.stamp,
            table.clock,
            resolution.source,
            resolution.target,
            resolution.counts,
            resolution.noted,
            num_routed,
            num_experts,
            first_entry,
            first_slot,
            num_slots,
            ROUTED=triton.next_power_of_2(num_routed),
            SLOTS=triton.next_power_of_2(num_slots),
            PAGE=PAGE_BYTES,
            COPIED_NOTE=COPIED,
            ABSENT_NOTE=ABSENT,
            num_warps=4,
        )


def gather(
    resolution: Resolution,
    cache: Tensor,  # uint8 [num_slots, slot_bytes]
    *,
    arena: int,
    num_items: int,
    record_bytes: int,
) -> None:
    """Copies what :func:`resolve` found missing, for the first ``num_items`` choices.

    ``arena`` is the address at which the device sees the arena. Raises ValueError if slots are too
    small for ``record_bytes`` or not made of 64-bit words.
    """
    slot_bytes = cache.shape[1]
    if record_bytes > slot_bytes or slot_bytes % 8 or record_bytes % 8:
        raise ValueError(f"records of {record_bytes} bytes do not go into slots of {slot_bytes}")
    words = record_bytes // 8
    programs = min(_GATHER_PROGRAMS, triton.cdiv(words, _WORDS_PER_TURN))
    with torch.cuda.device_of(cache):
        _gather[(programs,)](
            resolution.source,
            resolution.target,
            arena,
            cache.view(torch.int64),
            words,
            slot_bytes // 8,
            ITEMS=num_items,
            TURNS=triton.cdiv(words, programs * _WORDS_PER_TURN),
            WORDS=_WORDS_PER_TURN,
            num_warps=8,
        )

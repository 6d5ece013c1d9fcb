"""The experts of layers whose hidden states lie on a device with a memory of its own.

What :class:`~expertd_inference.experts.cpu.CpuExperts` is for the CPU. For each layer the host
waits once, for the routing and with it for what the next layers' routers make of this layer's
input. Then, without waiting: copies of what is not in the device's cache are queued, what is
there is computed while they run, then the rest; last come copies of what was guessed for the
next layers. Results stand in a slot per token and position, as everywhere, so they do not depend
on what came when, or from where.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from expertd_inference.device.cache import Found, Placed, SlotCache
from expertd_inference.device.copy_engine import CopyEngine, SlotUpload
from expertd_inference.device.cost import TYPICAL, CostModel
from expertd_inference.device.device import Device, Event
from expertd_inference.device.stats import DeviceStats
from expertd_inference.device.transaction import StepLostError, StepTransaction
from expertd_inference.experts.call import ExpertsCall
from expertd_inference.experts.recovery import SESSION_ENDED
from expertd_inference.experts.source import HeldSource
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.reference import fill_slots, sum_slots
from expertd_inference.kernels.wave import CachedWave, Routed, Wave
from expertd_inference.settings import DeviceSettings, OnMiss
from expertstore.errors import PreconditionError

MAX_SLOT_BYTES = 1 << 30
"""A long prompt is computed in blocks of tokens whose unsummed results fit in this."""

MAX_GUESS_TOKENS = 8
"""More tokens than this use so many experts that guesses gain nothing."""

MAX_CPU_TOKENS = 8
"""More tokens than this are computed where the GPU's matrix products are."""


class ExpertGuesser(Protocol):
    """What speculation asks: :class:`expertd_inference.experts.routers.LayerRouter`."""

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:
        """Experts by falling probability, [num]."""


FillSlots = Callable[[Tensor, Routed, Wave], None]
"""As ``kernels.cpu.reference.fill_slots``: what computes from the arena on the CPU."""


@dataclass(frozen=True)
class DeviceParts:
    """What the runner of one device works with."""

    device: Device
    cache: SlotCache
    slots: Tensor  # [num_slots + num_staging, slot_bytes], uint8, on the device
    record_bytes: Mapping[int, int]
    """By layer."""
    cost: CostModel = field(default_factory=lambda: CostModel(TYPICAL))
    fill_slots: FillSlots = fill_slots
    exact: bool = False
    """Whether the bits of a row may not depend on the other rows."""


@dataclass(frozen=True)
class _Block:
    """Rows of one layer on their way."""

    call: ExpertsCall
    slots: Tensor  # [T, k, H]
    on_host: Routed | None
    """The same rows on the host, where they may be computed."""

    @property
    def layer(self) -> int:
        return self.call.layer


class DeviceExpertsRunner:
    """Computes the MoE layers that lie on one device."""

    def __init__(
        self,
        parts: DeviceParts,
        source: HeldSource,
        transaction: StepTransaction,
        settings: DeviceSettings,
        stats: DeviceStats,
        hint: Callable[[Sequence[tuple[int, int]]], None],
    ) -> None:
        """``hint`` is told the (layer, expert) pairs that were guessed and are not in RAM."""
        self.device = parts.device
        self.cache = parts.cache
        self._source = source
        self._transaction = transaction
        self._settings = settings
        self._stats = stats
        self._hint = hint
        self._record_bytes = parts.record_bytes
        self.cost = parts.cost
        self.fill_slots = parts.fill_slots
        self._exact = parts.exact
        self._engine = CopyEngine(parts.device, parts.slots, source)
        self._table = SlotUpload(parts.device)
        self._routers: Mapping[int, ExpertGuesser] = {}
        self._runners: Mapping[int, DeviceExpertsRunner] = {}
        self._timed: tuple[Event, Event, int] | None = None
        self._closed = False

    @property
    def engine(self) -> CopyEngine:
        """What brings records to the device; its slots are the cache's."""
        return self._engine

    def __repr__(self) -> str:
        return f"<DeviceExpertsRunner {self.device.name} {self.cache!r}>"

    def speculate(
        self, routers: Mapping[int, ExpertGuesser], runners: Mapping[int, "DeviceExpertsRunner"]
    ) -> None:
        """From now on guesses for layers that have a router; ``runners`` are all, by layer."""
        self._routers, self._runners = routers, runners

    def close(self) -> None:
        """Refuses to be called from now on, and lets go of all that it has on the device."""
        self._closed = True
        self._engine.close()
        self._routers, self._runners, self._timed = {}, {}, None

    def run(self, call: ExpertsCall, /) -> Tensor:  # [T, H]
        """The layer's output, queued; see :class:`~expertd_inference.experts.call.ExpertsRunner`.

        Raises PreconditionError after :meth:`close`, DeviceError, StepLostError, and what the
        session raises once recovering does not help.
        """
        if self._closed:
            raise PreconditionError("This model was closed; load it again.")
        routed = call.routed
        row_bytes = routed.top_k * routed.rows.shape[1] * torch.float32.itemsize
        num_rows = max(1, MAX_SLOT_BYTES // row_bytes)
        while True:
            try:
                with self._transaction.forward_pass(), torch.no_grad():
                    self.cache.begin_layer(call.layer)
                    blocks = [self._run_block(call.with_rows(x)) for x in routed.split(num_rows)]
                return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            except StepLostError:
                # A layer that is called alone is a step, which changes nothing.
                if self._transaction.is_inside:
                    raise

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """As it is: nothing of a call is known before its routing is."""
        return call

    def _run_block(self, call: ExpertsCall) -> Tensor:
        layer, routed = call.layer, call.routed
        guesses = self._guesses(layer, routed.rows)
        wanted = [routed.index, *guesses.values()]
        to_cpu = self._settings.on_miss is not OnMiss.COPY and len(routed) <= MAX_CPU_TOKENS
        if to_cpu:
            wanted += [routed.rows, routed.weights]
        index, *rest = self.device.to_host(*wanted)
        # The host has waited for all that was computed before: so has it for its copies.
        self._transaction.verify()
        self._learn()
        on_host = Routed(rest[-2], index, rest[-1]) if to_cpu else None
        # What is past the last expert means "none".
        experts = sorted({e for e in index.flatten().tolist() if e < call.num_experts})
        block = _Block(call, routed.empty_slots(), on_host)
        self._compute(block, experts)
        absent = [
            (ahead, expert)
            for ahead, likeliest in zip(guesses, rest, strict=False)
            for expert in self._runners[ahead].guess(ahead, likeliest.tolist())
        ]
        if absent:
            self._stats.hints += len(absent)
            self._hint(absent)
        return sum_slots(block.slots, routed.rows.dtype)

    def _compute(self, block: _Block, experts: list[int]) -> None:
        """Queues all of ``experts``, in as many waves as the cache needs."""
        left = experts
        while left:
            present, missing = self.cache.split(block.layer, left)
            room = max(self.cache.room, block.call.routed.top_k)
            fits = len(missing) <= self.cache.num_free and len(left) <= self.cache.num_slots
            if len(left) <= room or fits:
                wave = [*present, *missing]
            elif present:
                wave = present[: self.cache.num_slots]
            else:
                # Half of its share, so that these are copied while the others are computed.
                wave = missing[: max(1, room // 2)]
            try:
                self._compute_wave(block, wave)
            except SESSION_ENDED as error:
                if isinstance(error, StepLostError):
                    raise
                # Bytes that were lost were used for this layer alone: it is computed again.
                self._transaction.recover(error)
                left = experts
                continue
            done = set(wave)
            left = [expert for expert in left if expert not in done]

    def _compute_wave(self, block: _Block, experts: Sequence[int]) -> None:
        layer, stats = block.layer, self._stats
        present, missing = self.cache.split(layer, experts)
        found = self._transaction.hold.find(layer, missing) if missing else {}
        absent = [expert for expert in missing if expert not in found]
        on_cpu = self._choose_for_cpu(block, list(found))
        copied = [expert for expert in found if expert not in on_cpu]
        placed = self.cache.assign(layer, [*present, *copied, *absent])
        try:
            events = [
                self._copy(layer, place, found[place.expert])
                for place in placed
                if place.expert in found
            ]
            if len(events) > 1:
                num_bytes = (len(events) - 1) * self._record_bytes[layer]
                self._timed = (events[0], events[-1], num_bytes)
            ready = [place for place in placed if place.found is Found.CACHED]
            coming = [place for place in placed if place.expert in found]
            for place in placed:
                if place.found is Found.STAGED:
                    stats.prefetch_useful += 1
                    if self._engine.arrival(place.slot).done:
                        self.device.wait_for(self._engine.arrival(place.slot))
                        ready.append(place)
                    else:
                        stats.prefetch_late += 1
                        coming.append(place)
            if coming and ready:
                self._queue(block, ready)
                ready = []
            for place in coming:
                self.device.wait_for(self._engine.arrival(place.slot))
            self._queue(block, [*ready, *coming])
            if on_cpu:
                self._compute_on_cpu(block, {expert: found[expert] for expert in on_cpu})
            if absent:
                self._fetch(block, [place for place in placed if place.expert in set(absent)])
        except BaseException:
            # Nothing has waited for these copies, or they were never queued.
            for place in placed:
                if place.found is not Found.CACHED:
                    self.cache.forget(layer, place.expert)
            raise
        finally:
            self.cache.release()
        stats.device_hits += sum(place.found is Found.CACHED for place in placed)
        stats.host_hits += len(found)
        stats.nvme_misses += len(absent)

    def _fetch(self, block: _Block, places: Sequence[Placed]) -> None:
        """What is not in RAM: the daemon reads it, and as much as fits there comes at once."""
        slot_of = {place.expert: place for place in places}
        for offsets in self._transaction.hold.fetch(block.layer, list(slot_of)):
            lot = [slot_of[expert] for expert in offsets]
            for place in lot:
                self._copy(block.layer, place, offsets[place.expert])
            for place in lot:
                self.device.wait_for(self._engine.arrival(place.slot))
            self._queue(block, lot)

    def _queue(self, block: _Block, places: Sequence[Placed]) -> None:
        """Queues the kernels of experts whose bytes have arrived by then."""
        if not places:
            return
        call = block.call
        slot_of = self._table.upload(
            call.num_experts, [(place.expert, place.slot) for place in places]
        )
        self.device.fill_slots_cached(
            block.slots,
            call.routed,
            CachedWave(self._engine.slots, slot_of, call.spec, self._exact),
        )
        self._engine.read([place.slot for place in places])

    def _copy(self, layer: int, place: Placed, offset: int) -> Event:
        expert, num_bytes = place.expert, self._record_bytes[layer]
        event = self._engine.copy(place.slot, offset, num_bytes)
        self._transaction.hold.reads(event, lambda: self.cache.forget(layer, expert))
        self._stats.copies += 1
        self._stats.bytes_copied += num_bytes
        return event

    def _learn(self) -> None:
        """How fast the last layer's copies were, now that they have arrived."""
        if self._timed is not None:
            first, last, num_bytes = self._timed
            self._timed = None
            if first.done and last.done:
                self.cost.observe_copies(num_bytes, last.seconds_since(first))

    # Guesses

    def _guesses(self, layer: int, hidden: Tensor) -> dict[int, Tensor]:
        """For the next layers, what their routers make of this one's input."""
        if not self._routers or len(hidden) > MAX_GUESS_TOKENS:
            return {}
        layers = sorted(self._runners)
        place = layers.index(layer) + 1
        return {
            ahead: self._routers[ahead].likeliest(hidden, self._num_guessed(len(hidden)))
            for ahead in layers[place : place + self._settings.layers_guessed]
            if ahead in self._routers
        }

    def _num_guessed(self, num_rows: int) -> int:
        """Of the union of what the rows' routers choose: so many for each, where there is room."""
        settings = self._settings
        room = settings.num_staging // max(1, settings.layers_guessed)
        return max(settings.num_guessed, min(settings.num_guessed * num_rows, room))

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Queues copies of what was guessed, where that evicts nothing; what is not in RAM."""
        # Several rows may have the same guess.
        missing = [e for e in dict.fromkeys(experts) if not self.cache.renew(layer, e)]
        if not missing:
            return []
        try:
            found = self._transaction.hold.find(layer, missing)
        except SESSION_ENDED:
            return []  # Whoever needs records will find that out, and recover.
        for expert, offset in found.items():
            slot = self.cache.stage(layer, expert)
            if slot is None:
                break
            try:
                self._copy(layer, Placed(expert, slot, Found.STAGED), offset)
            except BaseException:
                self.cache.forget(layer, expert)
                raise
            self._stats.prefetch_issued += 1
        return [expert for expert in missing if expert not in found]

    # The CPU's share

    def _choose_for_cpu(self, block: _Block, found: list[int]) -> set[int]:
        """Which of the misses that are in RAM are computed there."""
        if block.on_host is None or not found:
            return set()
        if self._settings.on_miss is OnMiss.CPU:
            return set(found)
        num = self.cost.num_on_cpu(len(found), self._record_bytes[block.layer])
        # Of those the last: whichever are copied are of use to the next tokens.
        return set(found[len(found) - num :])

    def _compute_on_cpu(self, block: _Block, offsets: Mapping[int, int]) -> None:
        """Computes experts where they lie in RAM, and merges their rows."""
        assert block.on_host is not None
        index, slots = block.on_host.index, block.on_host.empty_slots()
        arena = ArenaTensors(self._source.arena_address, self._source.mapped_bytes)
        begin = self.device.clock()
        wave = Wave(list(offsets), list(offsets.values()), arena, block.call.spec)
        self.fill_slots(slots, block.on_host, wave)
        num_bytes = len(offsets) * self._record_bytes[block.layer]
        self.cost.observe_cpu(num_bytes, self.device.clock() - begin)
        mask = torch.isin(index, torch.tensor(list(offsets), dtype=index.dtype))
        token, position = torch.where(mask)
        where = (self.device.to_device(token), self.device.to_device(position))
        block.slots[where] = self.device.to_device(slots[token, position])
        self._stats.cpu_computed += len(offsets)

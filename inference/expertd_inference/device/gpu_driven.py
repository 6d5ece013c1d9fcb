"""The experts of a decoding step without the host: the GPU finds, copies and computes them.

For each layer three kernels: resolve the routing against the slot table, gather what is missing
from the arena, compute (:mod:`~expertd_inference.kernels.gpu.triton_gather`). Nothing comes back to
the host, so a whole step can be one CUDA graph; it reads once, at the step's end, what was copied,
and whether an expert was not in RAM. Then the step is void: the daemon brings the record, and the
step is run again from its beginning.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd_inference.device.device import Device
from expertd_inference.device.recorder import GraphRecorder
from expertd_inference.experts.call import ExpertsCall
from expertd_inference.kernels.cpu.reference import sum_slots
from expertd_inference.kernels.wave import CachedWave


@dataclass(frozen=True)
class LayerEntries:
    """A MoE layer in the directory, and its share of the slots."""

    layer: int
    num_experts: int
    first_entry: int
    first_slot: int
    num_slots: int
    record_bytes: int


@dataclass(frozen=True)
class StepCounts:
    """What a step did; ``copied`` and ``absent`` are experts by layer."""

    num_hits: int
    copied: Mapping[int, Sequence[int]]
    absent: Mapping[int, Sequence[int]]

    @property
    def num_copied(self) -> int:
        """Of all layers."""
        return sum(map(len, self.copied.values()))

    @property
    def num_absent(self) -> int:
        """Of all layers."""
        return sum(map(len, self.absent.values()))


class GpuExperts:
    """Computes MoE layers whose records the device finds by itself.

    ``slots`` are [num_slots, slot_bytes] on ``device``; nobody else may use them meanwhile.
    ``arena_address`` is where the device sees the arena.
    """

    def __init__(
        self,
        device: Device,
        slots: Tensor,
        layers: Sequence[LayerEntries],
        arena_address: int,
        recorder: GraphRecorder,
        experts_per_token: int,
    ) -> None:
        """``experts_per_token`` is the most of any layer."""
        # Triton takes a second to import, and most workers have no GPU.
        from expertd_inference.kernels.gpu import triton_gather

        self.arena_address = arena_address
        self._top_k = experts_per_token
        self._kernels = triton_gather
        self._device, self._slots, self._recorder = device, slots, recorder
        self._layers = {each.layer: each for each in layers}
        num_entries = max(each.first_entry + each.num_experts for each in layers)
        where = slots.device
        self.table = triton_gather.SlotTable.empty(num_entries, len(slots), where)
        self._resolution = triton_gather.Resolution.empty(num_entries, where)
        self._words = torch.zeros(num_entries, dtype=torch.int64, device=where)
        self._read = torch.zeros(num_entries, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"<GpuExperts {len(self._layers)} layers, {len(self._slots)} slots>"

    def run(self, call: ExpertsCall, /) -> Tensor:  # [T, H]
        """The layer's output, queued or recorded; garbage if an expert turns out to be absent."""
        place = self._layers[call.layer]
        routed = replace(call.routed, index=call.routed.index.contiguous())
        slots = routed.empty_slots()
        first = place.first_entry
        slot_of = self.table.slot_of[first : first + place.num_experts]

        def launch() -> None:
            self._kernels.resolve(
                routed.index,
                self.table,
                self._resolution,
                directory=self._words,
                num_experts=call.num_experts,
                first_entry=first,
                first_slot=place.first_slot,
                num_slots=place.num_slots,
            )
            self._kernels.gather(
                self._resolution,
                self._slots,
                arena=self.arena_address,
                num_items=routed.index.numel(),
                record_bytes=place.record_bytes,
            )
            self._device.fill_slots_cached(
                slots, routed, CachedWave(self._slots, slot_of, call.spec)
            )

        self._recorder.launch(launch)
        return sum_slots(slots, routed.rows.dtype)

    def fits(self, num_rows: int) -> bool:
        """Whether so many rows can be computed at once."""
        from expertd_inference.kernels.gpu.triton_blocks import MAX_GEMV_TOKENS

        routed = num_rows * self._top_k
        return (
            num_rows <= MAX_GEMV_TOKENS
            and routed <= self._kernels.MAX_ROUTED
            and all(min(routed, x.num_experts) <= x.num_slots for x in self._layers.values())
        )

    def begin_trial(self) -> None:
        """As :meth:`begin_step`, of a step that finds no expert in RAM."""
        self._words.zero_()
        self._resolution.begin_step()

    def begin_step(self, directory: int) -> None:
        """Before the first layer, with the session held.

        ``directory`` is the address of its first entry in this process.
        """
        ctypes.memmove(self._read.data_ptr(), directory, self._read.nbytes)
        self._words.copy_(self._device.to_device(self._read))
        self._resolution.begin_step()

    def end_step(self) -> StepCounts:
        """What the step did; the host waits for all of it."""
        counts, noted = self._device.to_host(self._resolution.counts, self._resolution.noted)
        return StepCounts(
            int(counts[0]),
            self._by_layer(noted == self._kernels.COPIED),
            self._by_layer(noted == self._kernels.ABSENT),
        )

    def clear(self) -> None:
        """Forgets what the slots hold."""
        self.table.clear()

    def _by_layer(self, chosen: Tensor) -> dict[int, list[int]]:
        if not chosen.any():
            return {}
        found = {}
        for each in self._layers.values():
            part = chosen[each.first_entry : each.first_entry + each.num_experts]
            if experts := torch.nonzero(part).flatten().tolist():
                found[each.layer] = experts
        return found


def share_slots(
    layers: Sequence[tuple[int, int, int, int]], num_slots: int, experts_per_token: int
) -> list[LayerEntries] | None:
    """Equal shares of the slots, or None if a share is below what one token needs.

    ``layers`` are (layer, num_experts, first_entry, record_bytes).
    """
    share = num_slots // len(layers)
    if share < experts_per_token:
        return None
    return [
        LayerEntries(layer, num_experts, first_entry, place * share, share, record_bytes)
        for place, (layer, num_experts, first_entry, record_bytes) in enumerate(layers)
    ]

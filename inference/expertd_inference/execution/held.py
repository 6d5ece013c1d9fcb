"""Segments in one native call, for as long as their experts are in RAM.

While a lease is held native code may read the store's directory itself, so that nothing returns to
Python between two layers. Where an expert is absent, or has so many rows that torch multiplies
them, the call ends, and the layer is asked as ever.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd_inference.execution.segment import ExpertsRest, ProgramSegment
from expertd_inference.experts.cpu import CpuExperts, Held
from expertd_inference.kernels.cpu.library import TYPES, check_memory, native_layer, native_library
from expertd_inference.kernels.cpu.native import MAX_SUMMED
from expertd_inference.kernels.cpu.operations import HeldSegment, HeldStep
from expertd_inference.kernels.cpu.structures import NativeExpertsCall

MAX_ROWS = 64
"""Of a step with a lease of its own: while it is held nothing that it might read is evicted, and
with more rows a step takes long."""


class HeldSegments:
    """The segments of a model, all of which end with experts that native kernels compute."""

    def __init__(self, segments: Sequence[ProgramSegment], max_rows: int) -> None:
        """Raises ValueError if there is one of another kind."""
        rests = [segment.rest for segment in segments if isinstance(segment.rest, ExpertsRest)]
        runners = {id(rest.seat.runner): rest.seat.runner for rest in rests}
        if len(rests) != len(segments) or len(runners) != 1:
            raise ValueError("not every segment ends with experts")
        (runner,) = runners.values()
        if not isinstance(runner, CpuExperts) or not runner.is_native:
            raise ValueError("the experts are computed otherwise")
        self._experts = runner
        self._segments = segments
        self._layers = [rest.seat.layer for rest in rests]
        self._max_rows = min(max_rows, MAX_ROWS)
        self._keep: list[object] = []
        self._slots: dict[tuple[object, ...], Tensor] = {}
        rows = rests[0].routed.rows
        self._out = torch.empty(self._max_rows, rows.shape[1], dtype=rows.dtype)
        self._array = (HeldSegment * len(segments))()
        for entry, rest in zip(self._array, rests, strict=True):
            entry.call = ctypes.addressof(self._call(rest))
            entry.num_experts = rest.seat.num_experts
            entry.most_rows = runner.most_rows(rest.seat.spec, rows.dtype)
        self._used = (ctypes.c_int64 * sum(rest.seat.num_experts for rest in rests))()
        self._step = HeldStep(segments=ctypes.addressof(self._array), num_segments=len(segments))
        self._step.used = ctypes.addressof(self._used)
        self._address = ctypes.addressof(self._step)
        self._run = native_library().library.expertd_held_step  # type: ignore[union-attr]
        self._directory = 0
        self.num_done = 0
        """What the last :meth:`run` gave."""

    def run(self, step: int, num_rows: int) -> int:
        """As many segments as could be, from the first on; how many.

        ``step`` is the address of a :class:`.StepCall`. Raises MemoryError, and SessionLostError if
        what was computed may be wrong.
        """
        self.num_done = 0
        if num_rows > self._max_rows:
            return 0
        held = self._experts.hold()
        if held is None:
            return 0
        done, used = -1, 0
        try:
            self._place(held)
            for segment in self._segments:
                segment.read(self._out)
            self._step.step, self._step.num_used = step, 0
            done = self._run(self._address)
            used = self._step.num_used
        finally:
            good = held.release(self._used[:used])
        if done < 0:
            check_memory(1)
        self.num_done = done if good else 0
        return self.num_done

    def _place(self, held: Held) -> None:
        """Puts in where the arena and the directory are, which another session may change."""
        self._step.arena = held.arena_address
        if self._directory == held.directory:
            return
        self._directory = held.directory
        for entry, segment, layer in zip(self._array, self._segments, self._layers, strict=True):
            entry.program = segment.program.made()
            entry.first_entry = held.first_entry(layer)
            entry.words = self._directory + 8 * entry.first_entry

    def _call(self, rest: ExpertsRest) -> NativeExpertsCall:
        """All of a layer's call that stays."""
        layer, routed = native_layer(rest.seat.spec), rest.routed
        rows, index, weights = routed.rows, routed.index, routed.weights
        k = routed.top_k
        if layer is None or k > MAX_SUMMED or index.dtype != torch.int64:
            raise ValueError("the kernels do not know the experts")
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        slots = self._slots.setdefault(
            (k, dtype), torch.empty(self._max_rows, k, rows.shape[1], dtype=dtype)
        )
        tensors = (rows, index, weights, slots, self._out)
        call = NativeExpertsCall(
            *(ctypes.addressof(layer), 0, 0, 0),
            *(tensor.data_ptr() for tensor in tensors),
            *(0, 0, k),
            *(TYPES[each.dtype] for each in (rows, weights, slots)),
            0,
        )
        self._keep += [layer, routed, call]
        return call

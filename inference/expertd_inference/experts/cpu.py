"""The experts of a model as transformers calls them, computed from leased records.

transformers looks up ``config._experts_implementation`` among its registered functions and
calls it with the experts module in place of that module's own ``forward``
(``transformers.integrations.moe``). Ours finds in the module the seat that :func:`connect` has
put there: what computes the model's experts, and which layer this is.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertd_inference.experts.ahead import RouterAhead
from expertd_inference.experts.call import ExpertsCall, ExpertsSeat, seat_of, take_seat
from expertd_inference.experts.keeping import keep_fewer
from expertd_inference.experts.recovery import SESSION_ENDED, Recovery
from expertd_inference.experts.source import DirectoryLease, DirectorySource, ExpertSource
from expertd_inference.kernels.activation import activation_of
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.choice import CpuKernels, ReferenceKernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.reference import sum_slots
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
from expertstore.errors import PreconditionError, SessionLostError, UnavailableError
from expertstore.pack.manifest import Manifest
from expertstore.shared.host_memory import memory_available

IMPLEMENTATION = "expertd"
"""Our name among transformers' experts implementations."""

MAX_SLOT_BYTES = 256 << 20
"""A long prompt is computed in blocks of tokens whose unsummed results fit in this.

One lease serves all of them, unless the layer's experts do not fit into the daemon's budget all at
once: each block would read them anew, and may be as large as ``_SLOT_SHARE`` of the free memory.
"""
_SLOT_SHARE = 1 / 4


class CpuExperts:
    """Computes the MoE layers of one model, one at a time."""

    def __init__(
        self,
        source: ExpertSource,
        recovery: Recovery,
        kernels: CpuKernels,
        *,
        first_layer: int,
        ahead: RouterAhead | None = None,
    ) -> None:
        self._source = source
        self._kernels = kernels
        self._ahead = ahead
        self._recovery = recovery
        self._first_layer = first_layer
        self._arena = ArenaTensors(source.arena_address, source.mapped_bytes)
        self._closed = False
        # A session has one holder at a time, and models are called from several threads.
        self._lock = threading.Lock()

    def close(self) -> None:
        """From now on the model refuses to be called, rather than wait for a daemon."""
        self._closed = True

    def run(self, call: ExpertsCall, /) -> Tensor:  # [T, H]
        """The layer's output; see :class:`~expertd_inference.experts.call.ExpertsRunner`.

        Raises PreconditionError after :meth:`close`, and what the session raises once
        recovering does not help.
        """
        if self._closed:
            raise PreconditionError("This model was closed; load it again.")
        if not len(call.routed):
            return torch.empty_like(call.routed.rows)
        with self._lock:
            if not torch.is_grad_enabled():
                return self._run(call)
            with torch.no_grad():
                return self._run(call)

    @property
    def is_native(self) -> bool:
        """Whether native kernels compute."""
        return self._kernels.name == "native"

    def most_rows(self, spec: ExpertsSpec, dtype: torch.dtype) -> int:
        """Up to how many rows of ``dtype`` of one expert the kernels compute, native ones."""
        assert isinstance(self._kernels, NativeKernels)
        most = self._kernels.most_rows(spec.layout.inward, dtype)
        return sys.maxsize if most is None else most

    def hold(self) -> "Held | None":
        """What is in RAM now stays there until the result is released; no other thread computes.

        None where layers have to be asked one by one: of copies, or while hints are given. Raises
        PreconditionError after :meth:`close`, and what recovering a session raises.
        """
        if self._closed:
            raise PreconditionError("This model was closed; load it again.")
        source = self._source
        if not isinstance(source, DirectorySource) or not source.directory_address:
            return None
        with ExitStack() as undo:
            undo.enter_context(self._lock)
            self._begin_step()
            if self._ahead is not None and not self._ahead.is_idle():
                return None
            try:
                lease = source.hold()
            except SESSION_ENDED as error:
                self._recover(error)
                return None
            return Held(self._arena.address, source, lease, undo.pop_all(), self._lost)

    def _lost(self, error: SessionLostError | None) -> None:
        if error is None:
            self._recovery.progressed()
        else:
            self._recover(error)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """By what the kernels can work out once."""
        return replace(call, prepared=self._kernels.prepare(call.routed, call.spec))

    def _run(self, call: ExpertsCall) -> Tensor:
        routed = call.routed
        if call.layer == self._first_layer:
            self._begin_step()
        if self._ahead is not None:
            self._ahead.begin(call.layer, routed.rows, routed.index, call.num_experts)
        if len(routed) == 1:
            return self._run_block(call)
        row_bytes = routed.top_k * routed.rows.shape[1] * torch.float32.itemsize
        num_rows = max(1, MAX_SLOT_BYTES // row_bytes)
        if len(routed) <= num_rows:
            return self._run_block(call)
        if call.num_experts <= self._source.max_wave:
            return self._run_block(call, num_rows)
        num_rows = max(num_rows, int(memory_available() * _SLOT_SHARE) // row_bytes)
        return torch.cat([self._run_block(call.with_rows(part)) for part in routed.split(num_rows)])

    def _run_block(self, call: ExpertsCall, num_rows: int | None = None) -> Tensor:
        """The output for these rows, each expert leased once; in parts of ``num_rows``."""
        routed, prepared = call.routed, call.prepared
        experts = sorted({*routed.index.view(-1).tolist()})
        # What is past the last expert means "none".
        while experts and experts[-1] >= call.num_experts:
            experts.pop()
            prepared = None
        slots: Tensor | None = None
        limit = len(experts)
        while experts:
            try:
                for lease in self._source.waves(call.layer, experts[:limit]):
                    with lease:
                        wave = Wave(lease.experts, lease.offsets, self._arena, call.spec)
                        whole = None
                        if slots is not None or len(lease.experts) < len(experts):
                            slots = routed.empty_slots() if slots is None else slots
                            self._kernels.fill_slots(slots, routed, wave)
                        elif num_rows is None:
                            whole = self._kernels.output(routed, wave, prepared)
                        else:
                            whole = self._output_in_parts(num_rows, routed, wave)
                    # Only now is it certain that the bytes were good until the end. Had they
                    # not been, the same experts are computed again, into the same slots.
                    experts = experts[len(lease.experts) :]
                    self._recovery.progressed()
                    if whole is not None:
                        return whole
            except SESSION_ENDED as error:
                if isinstance(error, SessionLostError):
                    limit = max(1, limit // 2)
                self._recover(error)
        slots = routed.empty_slots() if slots is None else slots
        return sum_slots(slots, routed.rows.dtype)

    def _output_in_parts(self, num_rows: int, routed: Routed, wave: Wave) -> Tensor:
        """As the kernels' ``output``, in the memory of so many rows."""
        parts = []
        for part in routed.split(num_rows):
            used = {*part.index.reshape(-1).tolist()}
            parts.append(self._kernels.output(part, wave.only(used)))
        return torch.cat(parts)

    def _begin_step(self) -> None:
        """Leaves a dead daemon's arena at the next step's start.

        What is resident could be read for ever, but a mapping that is kept keeps the old
        arena's memory beside the new one's, and nobody would count its experts' heat.
        """
        while not self._source.connected:
            self._recover(UnavailableError("The daemon is gone."))

    def _recover(self, error: Exception) -> None:
        self._recovery.recover(error)
        self._arena = ArenaTensors(self._source.arena_address, self._source.mapped_bytes)


class Held:
    """Experts that stay where they are; see :meth:`CpuExperts.hold`."""

    def __init__(
        self,
        arena_address: int,
        source: DirectorySource,
        lease: DirectoryLease,
        lock: ExitStack,
        ended: Callable[[SessionLostError | None], None],
    ) -> None:
        self.arena_address = arena_address
        """The address that records' offsets count from."""
        self._source = source
        self._lease = lease
        self._lock = lock
        self._ended = ended

    @property
    def directory(self) -> int:
        """The address of the directory's first entry."""
        return self._source.directory_address

    def first_entry(self, layer: int) -> int:
        """The number of the entry of a layer's expert 0."""
        return self._source.first_entry(layer)

    def release(self, entries: Sequence[int]) -> bool:
        """``entries`` were used. False if what was read may have changed meanwhile.

        Raises what recovering the session raises.
        """
        with self._lock:
            try:
                self._lease.note(entries)
                self._lease.release()
            except SessionLostError as error:
                self._ended(error)
                return False
            self._ended(None)
            return True


def connect(
    experts: Mapping[int, nn.Module],
    manifest: Manifest,
    source: ExpertSource,
    recovery: Recovery,
    kernels: CpuKernels | None = None,
    ahead: RouterAhead | None = None,
) -> CpuExperts:
    """Lets ``experts``, a module per MoE layer, compute from ``source``; ``ahead`` hints.

    By the reference kernels, unless others are given.
    """
    runner = CpuExperts(
        source, recovery, kernels or ReferenceKernels(), first_layer=min(experts), ahead=ahead
    )
    for layer in manifest.layers:
        module = experts[layer.layer]
        spec = experts_spec(module, manifest, layer.layout)
        take_seat(module, ExpertsSeat(runner, layer.layer, layer.num_experts, spec))
    return runner


def experts_spec(module: Any, manifest: Manifest, layout: int) -> ExpertsSpec:  # noqa: ANN401
    """What the experts of ``module`` share, whose records have that layout of the manifest."""
    apply_gate = module._apply_gate if module.has_gate else module.act_fn
    return ExpertsSpec(
        manifest.layouts[layout], manifest.gate_order, apply_gate, activation_of(module)
    )


def _experts_forward(
    self: Any,  # noqa: ANN401 - one of sixty experts classes of transformers
    hidden_states: Tensor,  # [T, H]
    top_k_index: Tensor,  # [T, k]
    top_k_weights: Tensor,  # [T, k]
) -> Tensor:  # [T, H]
    seat = seat_of(self)
    return seat.runner.run(keep_fewer(seat.call(hidden_states, top_k_index, top_k_weights)))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model``, by name, whose ``forward`` transformers lets us replace."""
    # The decorator of transformers' seam sets both, and nothing else sets either.
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "has_gate")
    }


def layer_numbers(names: Sequence[str]) -> list[int]:
    """The decoder layer of each module name, as in ``model.layers.3.mlp.experts``.

    Raises ValueError for a name without a number.
    """
    numbers = []
    for name in names:
        digits = [part for part in name.split(".") if part.isdigit()]
        if len(digits) != 1:
            raise ValueError(f"{name} names no layer")
        numbers.append(int(digits[0]))
    return numbers

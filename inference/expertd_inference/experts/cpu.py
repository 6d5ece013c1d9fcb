"""The experts of a model as transformers calls them, computed from leased records.

transformers looks up ``config._experts_implementation`` among its registered functions and
calls it with the experts module in place of that module's own ``forward``
(``transformers.integrations.moe``). Ours finds in the module what :func:`connect` has put
there: the :class:`ExpertsRunner` of the model, and which layer this is.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expertd_inference.experts.ahead import RouterAhead
from expertd_inference.experts.recovery import SESSION_ENDED, Recovery
from expertd_inference.experts.source import ExpertSource
from expertd_inference.kernels.activation import activation_of
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.choice import CpuKernels, ReferenceKernels
from expertd_inference.kernels.cpu.reference import ExpertsSpec, empty_slots, sum_slots
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


class ExpertsRunner:
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

    def run(
        self,
        layer: int,
        spec: ExpertsSpec,
        num_experts: int,
        hidden: Tensor,  # [T, H]
        top_k_index: Tensor,  # [T, k]
        top_k_weights: Tensor,  # [T, k]
        memo: dict[str, Any] | None = None,
    ) -> Tensor:  # [T, H]
        """The layer's output; ``memo`` is :class:`.CpuKernels`'s.

        Raises PreconditionError after :meth:`close`, and what the session raises once
        recovering does not help.
        """
        if self._closed:
            raise PreconditionError("This model was closed; load it again.")
        if not len(hidden):
            return torch.empty_like(hidden)
        call = (layer, spec, num_experts, hidden, top_k_index, top_k_weights, memo)
        with self._lock:
            if not torch.is_grad_enabled():
                return self._run(*call)
            with torch.no_grad():
                return self._run(*call)

    def _run(
        self,
        layer: int,
        spec: ExpertsSpec,
        num_experts: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        memo: dict[str, Any] | None,
    ) -> Tensor:
        if layer == self._first_layer:
            self._begin_step()
        if self._ahead is not None:
            self._ahead.begin(layer, hidden, top_k_index)
        tokens = hidden.shape[0]
        if tokens > 1:
            row_bytes = top_k_index.shape[1] * hidden.shape[1] * torch.float32.itemsize
            num_rows = max(1, MAX_SLOT_BYTES // row_bytes)
        if tokens == 1 or tokens <= num_rows:
            return self._run_block(
                layer, spec, num_experts, hidden, top_k_index, top_k_weights, memo
            )
        if num_experts <= self._source.max_wave:
            return self._run_block(
                layer, spec, num_experts, hidden, top_k_index, top_k_weights, None, num_rows
            )
        num_rows = max(num_rows, int(memory_available() * _SLOT_SHARE) // row_bytes)
        blocks = [
            self._run_block(layer, spec, num_experts, *rows, None)
            for rows in _split(num_rows, hidden, top_k_index, top_k_weights)
        ]
        return torch.cat(blocks)

    def _run_block(
        self,
        layer: int,
        spec: ExpertsSpec,
        num_experts: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        memo: dict[str, Any] | None,
        num_rows: int | None = None,
    ) -> Tensor:
        """The output for these tokens, each expert leased once; in parts of ``num_rows``."""
        experts = sorted({*top_k_index.view(-1).tolist()})
        # What is past the last expert means "none" where tokens are spread over devices.
        while experts and experts[-1] >= num_experts:
            experts.pop()
        slots: Tensor | None = None
        limit = len(experts)
        while experts:
            try:
                for lease in self._source.waves(layer, experts[:limit]):
                    with lease:
                        arguments = _Arguments(
                            experts=lease.experts,
                            records=lease.offsets,
                            arena=self._arena,
                            spec=spec,
                        )
                        if slots is None and len(lease.experts) == len(experts):
                            output = (
                                self._kernels.output
                                if num_rows is None
                                else partial(self._output_in_parts, num_rows)
                            )
                            whole = output(
                                hidden, top_k_index, top_k_weights, **arguments, memo=memo
                            )
                        else:
                            whole = None
                            slots = empty_slots(hidden, top_k_weights) if slots is None else slots
                            self._kernels.fill_slots(
                                slots, hidden, top_k_index, top_k_weights, **arguments
                            )
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
        slots = empty_slots(hidden, top_k_weights) if slots is None else slots
        return sum_slots(slots, hidden.dtype)

    def _output_in_parts(
        self,
        num_rows: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        experts: Sequence[int],
        records: Sequence[int],
        arena: ArenaTensors,
        spec: ExpertsSpec,
        memo: dict[str, Any] | None,
    ) -> Tensor:
        """As the kernels' ``output``, in the memory of so many tokens."""
        parts = []
        for rows in _split(num_rows, hidden, top_k_index, top_k_weights):
            used = {*rows[1].reshape(-1).tolist()}
            pairs = [pair for pair in zip(experts, records, strict=True) if pair[0] in used]
            parts.append(
                self._kernels.output(
                    *rows,
                    experts=[expert for expert, _ in pairs],
                    records=[record for _, record in pairs],
                    arena=arena,
                    spec=spec,
                    memo=memo,
                )
            )
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


def _split(
    num_rows: int,
    hidden: Tensor,  # [T, H]
    top_k_index: Tensor,  # [T, k]
    top_k_weights: Tensor,  # [T, k]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(
        torch.split(hidden, num_rows),
        torch.split(top_k_index, num_rows),
        torch.split(top_k_weights, num_rows),
        strict=True,
    )


class _Arguments(TypedDict):
    """What kernels are told about a wave."""

    experts: Sequence[int]
    records: Sequence[int]
    arena: ArenaTensors
    spec: ExpertsSpec


def connect(
    experts: Mapping[int, nn.Module],
    manifest: Manifest,
    source: ExpertSource,
    recovery: Recovery,
    kernels: CpuKernels | None = None,
    ahead: RouterAhead | None = None,
) -> ExpertsRunner:
    """Lets ``experts``, a module per MoE layer, compute from ``source``; ``ahead`` hints.

    By the reference kernels, unless others are given.
    """
    runner = ExpertsRunner(
        source, recovery, kernels or ReferenceKernels(), first_layer=min(experts), ahead=ahead
    )
    for layer in manifest.layers:
        module: Any = experts[layer.layer]
        spec = experts_spec(module, manifest, layer.layout)
        module._expertd = (runner, layer.layer, spec, layer.num_experts)
    return runner


def experts_spec(module: Any, manifest: Manifest, layout: int) -> ExpertsSpec:  # noqa: ANN401
    """What the experts of ``module`` share, whose records have that layout of the manifest."""
    return ExpertsSpec(
        manifest.layouts[layout], manifest.gate_order, module._apply_gate, activation_of(module)
    )


def _experts_forward(
    self: Any,  # noqa: ANN401 - one of sixty experts classes of transformers
    hidden_states: Tensor,  # [T, H]
    top_k_index: Tensor,  # [T, k]
    top_k_weights: Tensor,  # [T, k]
) -> Tensor:  # [T, H]
    runner, layer, spec, num_experts = self._expertd
    result: Tensor = runner.run(layer, spec, num_experts, hidden_states, top_k_index, top_k_weights)
    return result


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

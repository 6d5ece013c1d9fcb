"""How long the worker's own kernels take for a token, on this host: measured, not assumed.

Each different call that a token makes (a layer's experts, each matrix of the trunk) is run over
memory that no cache holds, on one token, in turns with all the others; the median of its turns
counts. No ratio between schemes, processors or widths is assumed anywhere.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch
from torch.nn import functional

from expertd_inference.advice.probes import MemoryProbe
from expertd_inference.advice.values import Need, matrix_bytes
from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.cpu.choice import CpuKernels, ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.linear import PreparedCall, describe, linear_kernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.pack.layout import PAGE_BYTES, Encoding, Matrix, RecordLayout, record_layout
from expertstore.pack.manifest import GateOrder

ROUNDS = 5
SMALL_BYTES = 2 << 20
"""Plain matrices up to here are routers. The worker has a call of its own for them, which takes as
long as reading them."""
_PLACES = 256


@dataclass
class _Call:
    """One call as a token makes it; ``scale`` makes up for what was left out of it."""

    run: Callable[[int], object]
    """With the number of the call, so that each reads from elsewhere."""
    scale: float = 1.0
    seconds: list[float] = field(default_factory=list)
    at: int = 0

    def measure(self, seconds: float) -> None:
        """Runs it for about so long, once at least, and notes the mean."""
        began = now = time.perf_counter()
        first = self.at
        while now - began < seconds or self.at == first:
            self.run(self.at)
            self.at += 1
            now = time.perf_counter()
        self.seconds.append(self.scale * (now - began) / (self.at - first))


class _Key(NamedTuple):
    """What tells one call from another."""

    what: RecordLayout | Matrix
    top_k: int = 1
    native: bool = True
    """Whether the worker takes the native kernels for it, where they are."""


class KernelTimes:
    """Of the calls of several models and schemes, by torch's number of threads."""

    def __init__(self, memory: MemoryProbe, needs: Sequence[Need]) -> None:
        self._memory = memory
        self._native = None if native_library().library is None else NativeKernels()
        self._memory_rate = 1.0
        self._calls: dict[_Key, _Call] = {}
        for need in needs:
            for key in _keys(need):
                if key not in self._calls:
                    self._calls[key] = self._call(key, need.dtype)

    def run(self, seconds: float) -> None:
        """Measures all of them in turns, in about so many seconds."""
        self._memory_rate = self._memory.rate()
        for call in self._calls.values():
            call.run(0)  # what is prepared once is not measured
        each = seconds / ROUNDS / max(1, len(self._calls))
        with torch.inference_mode():
            for _ in range(ROUNDS):
                for call in self._calls.values():
                    call.measure(each)

    def seconds(self, need: Need) -> float:
        """Of a token of ``need``, one of those given."""
        small = sum(
            count * matrix_bytes(matrix) for matrix, count in need.linears if _is_small(matrix)
        )
        return small / self._memory_rate + sum(
            count * statistics.median(self._calls[key].seconds)
            for key, count in _keys(need).items()
        )

    def _call(self, key: _Key, dtype: str) -> _Call:
        if isinstance(key.what, Matrix):
            return self._linear(key.what, dtype, native=key.native)
        return self._experts(key.what, key.top_k, native=key.native)

    def _experts(self, layout: RecordLayout, top_k: int, *, native: bool) -> _Call:
        hidden_size = layout.matrix("down").out_features
        kernels: CpuKernels = ReferenceKernels()
        if self._native is not None and native:
            kernels = self._native
        activation, apply_gate = (
            (ActivationKind.SILU, _silu) if layout.is_gated else (ActivationKind.RELU2, _relu2)
        )
        spec = ExpertsSpec(layout, GateOrder.CONCATENATED, apply_gate, Activation(activation))
        places = self._places(layout.record_bytes)
        routed = Routed(
            torch.full((1, hidden_size), 1e-3, dtype=torch.bfloat16),
            torch.arange(top_k)[None],
            torch.full((1, top_k), 1 / top_k, dtype=torch.bfloat16),
        )
        experts, arena = range(top_k), self._memory.arena

        def run(number: int) -> object:
            records = [places[(number * top_k + j) % len(places)] for j in experts]
            return kernels.output(routed, Wave(experts, records, arena, spec))

        return _Call(run)

    def _linear(self, matrix: Matrix, dtype: str, *, native: bool) -> _Call:
        rows = matrix.out_features
        per_row = matrix.in_features * (2 if matrix.encoding is Encoding.PLAIN else 1)
        # Of a large matrix some of the rows: a head may be larger than the memory.
        most = max(256, self._memory.num_bytes // 4 // per_row // 256 * 256)
        part = msgspec.structs.replace(matrix, out_features=min(rows, most))
        layout = record_layout((part,), dtype, has_bias=False)
        places = self._places(layout.record_bytes)
        hidden = torch.full((1, matrix.in_features), 1e-3, dtype=torch.bfloat16)
        arena = self._memory.arena
        if matrix.encoding is Encoding.PLAIN:
            tensors = [arena.part(at, layout.parts[0]).to(torch.bfloat16) for at in places]
            steps = linear_kernels() if native and self._native is not None else None
            if steps is None:
                run: Callable[[int], object] = lambda number: functional.linear(  # noqa: E731
                    hidden, tensors[number % len(tensors)]
                )
            else:
                calls = [PreparedCall(describe(tensor)) for tensor in tensors]
                out = hidden.new_empty(1, part.out_features)
                run = lambda number: steps.multiply(  # noqa: E731
                    calls[number % len(calls)], hidden, out
                )
        else:
            product = ReferenceKernels.linear if self._native is None else self._native.linear
            matrices = [
                QuantizedWeight(part, {piece.name: arena.part(at, piece) for piece in layout.parts})
                for at in places
            ]
            run = lambda number: product(hidden, matrices[number % len(matrices)])  # noqa: E731
        return _Call(run, rows / part.out_features)

    def _places(self, num_bytes: int) -> list[int]:
        """Where records may begin; they overlap, but come round only after all of the memory."""
        last = self._memory.num_bytes - num_bytes
        count = max(1, min(_PLACES, self._memory.num_bytes // PAGE_BYTES))
        step = max(num_bytes, last // count)
        places = list(range(0, last + 1, -(-step // PAGE_BYTES) * PAGE_BYTES))
        return places or [0]


def memory_bytes(needs: Sequence[Need]) -> int:
    """What the memory for them must have at least."""
    return max(need.max_record_bytes for need in needs) * 5 // 4


def _keys(need: Need) -> dict[_Key, int]:
    keys: dict[_Key, int] = {}
    # A pack of 16-bit experts is computed by torch's own products, all of it.
    native = not all(_is_plain(group.layout) for group in need.experts)
    for group in need.experts:
        key = _Key(group.layout, group.top_k, native)
        keys[key] = keys.get(key, 0) + group.count
    for matrix, count in need.linears:
        if not _is_small(matrix):
            keys[_Key(matrix, native=native or matrix.encoding is not Encoding.PLAIN)] = count
    return keys


def _is_small(matrix: Matrix) -> bool:
    return matrix.encoding is Encoding.PLAIN and matrix_bytes(matrix) <= SMALL_BYTES


def _is_plain(layout: RecordLayout) -> bool:
    return all(matrix.encoding is Encoding.PLAIN for matrix in layout.matrices)


def _silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _relu2(up: torch.Tensor) -> torch.Tensor:
    return functional.relu(up).square()

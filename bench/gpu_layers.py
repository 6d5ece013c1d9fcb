"""Layers of experts in a device cache, full of random bytes, for the kernels' bench."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu_turns import Run, captured
from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.gpu.choice import gpu_kernels
from expertd_inference.kernels.gpu.triton_blocks import GemvBlocks
from expertd_inference.kernels.gpu.triton_form import Form, record_form
from expertd_inference.kernels.gpu.triton_gemv import launch_experts_gemv
from expertd_inference.kernels.wave import CachedWave, ExpertsSpec, Routed
from expertd_testing import forms
from expertd_testing.forms import is_kept, named
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.layout import (
    DOWN,
    GATE_UP,
    Matrix,
    RecordLayout,
    matrix_parts,
    record_layout,
)
from expertstore.pack.manifest import GateOrder

SILU = Activation(ActivationKind.SILU)


@dataclass(frozen=True)
class Shape:
    """Experts [2 * inner, hidden] and [hidden, inner], of which a token takes ``top_k``."""

    name: str
    hidden: int
    inner: int
    top_k: int


class CachedLayer:
    """A device cache full of random experts, each of another expert's number."""

    def __init__(self, run: Run, shape: Shape, scheme: str) -> None:
        matrices = (
            named(scheme, GATE_UP, 2 * shape.inner, shape.hidden),
            named(scheme, DOWN, shape.hidden, shape.inner),
        )
        self._run, self._shape = run, shape
        self._layout = record_layout(matrices, "BF16", has_bias=False)
        record = random_record(self._layout, run.device)
        self._num = max(shape.top_k, run.cache_bytes // self._layout.record_bytes)
        # The same values in other places: what is read matters, and not what it says.
        self._wave = CachedWave(
            record.repeat(self._num, 1),
            torch.arange(self._num, dtype=torch.int32, device=run.device),
            ExpertsSpec(self._layout, GateOrder.CONCATENATED, torch.nn.functional.silu, SILU),
        )
        self.token_bytes = run.calls * shape.top_k * sum(p.num_bytes for p in self._layout.parts)

    def form(self, name: str) -> Form:
        """The kernels' own description of a matrix."""
        return record_form(self._layout, name)

    def matrix_bytes(self, name: str) -> int:
        """What one graph of :meth:`matrix` reads."""
        parts = sum(p.num_bytes for p in self._layout.parts if p.name.startswith(f"{name}."))
        return self._run.calls * self._shape.top_k * parts

    def tokens(self, num_tokens: int) -> Callable[[], None]:
        """A graph of calls for so many tokens; each call for other experts."""
        shape, device = self._shape, self._run.device
        hidden = torch.randn(num_tokens, shape.hidden, device=device).bfloat16()
        slots = torch.zeros(num_tokens, shape.top_k, shape.hidden, device=device)
        weights = torch.full((num_tokens, shape.top_k), 0.5, device=device)
        fill, wave = gpu_kernels().fill_slots_cached, self._wave
        return captured(
            self._run,
            [
                lambda index=index: fill(slots, Routed(hidden, index, weights), wave)
                for index in self._routings(num_tokens)
            ],
        )

    def matrix(self, name: str, blocks: GemvBlocks) -> Callable[[], None]:
        """A graph of calls for one token and one matrix, with these block sizes."""
        shape, device = self._shape, self._run.device
        gated = name == GATE_UP
        x = torch.randn(1 if gated else shape.top_k, shape.hidden if gated else shape.inner)
        x = x.to(device, torch.bfloat16)
        out = torch.zeros(shape.top_k, shape.inner, device=device, dtype=torch.bfloat16)
        if not gated:
            out = torch.zeros(1, shape.top_k, shape.hidden, device=device)
        weights = torch.full((1, shape.top_k), 0.5, device=device)
        form = self.form(name)
        return captured(
            self._run,
            [
                lambda index=index: launch_experts_gemv(
                    out,
                    x,
                    index,
                    weights,
                    self._wave.slot_of,
                    self._wave.cache,
                    form,
                    SILU if gated else None,
                    blocks,
                )
                for index in self._routings(1)
            ],
        )

    def dense(self, num_tokens: int) -> tuple[Callable[[], None], int]:
        """Torch's product of as many operations as the experts of the tokens take, and these."""
        shape, device = self._shape, self._run.device
        rows = num_tokens * shape.top_k
        x = torch.randn(rows, shape.hidden, device=device).bfloat16()
        weight = torch.randn(3 * shape.inner, shape.hidden, device=device).bfloat16()
        actions = [lambda: torch.nn.functional.linear(x, weight)] * self._run.calls
        operations = self._run.calls * 2 * rows * 3 * shape.inner * shape.hidden
        return captured(self._run, actions), operations

    def _routings(self, num_tokens: int) -> Iterator[Tensor]:
        k = self._shape.top_k
        for call in range(self._run.calls):
            if num_tokens == 1:
                chosen = torch.arange(call * k, (call + 1) * k) % self._num
                yield chosen.view(1, k).to(self._run.device)
            else:
                chosen = torch.rand(num_tokens, min(self._num, 128)).topk(k).indices
                yield chosen.to(self._run.device)


def random_parts(matrix: Matrix, device: str) -> dict[str, Tensor]:
    """Parts of a matrix: random integers, scales near those of real weights."""
    if is_kept(matrix):
        generator = torch.Generator().manual_seed(0)
        return {
            name: part.to(device) for name, part in forms.random_parts(matrix, generator).items()
        }
    parts = {}
    for name, shape, dtype in matrix_parts(matrix, "BF16"):
        if dtype == "U8":
            part = torch.randint(0, 256, shape, device=device)
        else:
            part = torch.full(shape, 0.01, device=device)
        parts[name] = part.to(TORCH_DTYPES[dtype])
    return parts


def random_record(layout: RecordLayout, device: str) -> Tensor:
    """The bytes [1, record_bytes] of one expert."""
    record = torch.zeros(1, layout.record_bytes, dtype=torch.uint8, device=device)
    for matrix in layout.matrices:
        for name, tensor in random_parts(matrix, device).items():
            part = layout.part(name)
            piece = record[0, part.offset : part.offset + part.num_bytes]
            piece.copy_(tensor.contiguous().view(torch.uint8).flatten())
    return record

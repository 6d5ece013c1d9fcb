"""Adapters of the rows of a step: what is added to linear layers and experts, row by row."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from expertd_inference.experts.call import ExpertsCall, ExpertsRunner
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.reference import fill_slots
from expertd_inference.kernels.wave import Routed


@dataclass(frozen=True, eq=False)
class LowRankWeights:
    """``scale * B(A(x))``, computed in float32."""

    a: Tensor
    """[r, in], floating; it may be a mapped file's."""
    b: Tensor
    """[out, r]."""
    scale: float

    def of(self, rows: Tensor, *, row_by_row: bool) -> Tensor:
        """Of ``rows`` [n, in]: [n, out], float32.

        With ``row_by_row`` the bits of a row do not depend on the others.
        """
        a, b = (each.to(rows.device).float() for each in (self.a, self.b))
        parts = torch.split(rows.float(), 1 if row_by_row else max(1, len(rows)))
        return torch.cat([(part @ a.T) @ b.T for part in parts]) * self.scale


@dataclass(frozen=True, eq=False)
class AdaptedExperts:
    """What is added to the experts of one layer."""

    parts: Mapping[tuple[int, str], Sequence[tuple[slice, LowRankWeights]]]
    """By expert and matrix (``gate_up``, ``down``): the rows of its product, and what is added."""
    row_by_row: bool = False

    def kernels(self) -> ReferenceKernels:
        """What computes the layer's experts with it: torch."""
        return ReferenceKernels(partial(fill_slots, row_by_row=self.row_by_row, added=self._added))

    def _added(self, expert: int, matrix: str, rows: Tensor, product: Tensor) -> Tensor:
        parts = self.parts.get((expert, matrix))
        if not parts:
            return product
        wide = product.float()
        for place, weights in parts:
            wide[:, place] += weights.of(rows, row_by_row=self.row_by_row)
        return wide.to(product.dtype)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one adapter adds to a model.

    ``key`` is the same only of the same weights: keys and values are shared by it. ``experts`` are
    those of layers, by the decoder layer's number.
    """

    key: str
    linears: Mapping[nn.Module, LowRankWeights]
    experts: Mapping[int, AdaptedExperts]


class AdaptedRows:
    """Which rows of a step have which adapter."""

    def __init__(self, spans: Sequence[tuple[Adapter | None, int]], device: torch.device) -> None:
        """``spans`` are numbers of consecutive rows."""
        rows: dict[Adapter, list[int]] = {}
        first = 0
        for adapter, num in spans:
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(first, first + num))
            first += num
        self.num_rows = first
        self.groups = [(each, torch.tensor(at, device=device)) for each, at in rows.items()]
        """Each adapter, and its rows."""


class _Step(threading.local):
    rows: AdaptedRows | None = None


_step = _Step()


@contextmanager
def adapting(rows: AdaptedRows | None) -> Iterator[None]:
    """While this thread computes rows that have adapters; None if none has."""
    before, _step.rows = _step.rows, rows
    try:
        yield
    finally:
        _step.rows = before


def run_adapted(runner: ExpertsRunner, call: ExpertsCall) -> Tensor:  # [T, H]
    """What ``runner`` gives, of each adapter's rows with what that adds to the layer's experts."""
    adapted = _step.rows
    groups = [] if adapted is None else [x for x in adapted.groups if call.layer in x[0].experts]
    if adapted is None or not groups:
        return runner.run(call)
    routed = call.routed
    if len(routed) != adapted.num_rows:
        raise RuntimeError(f"a layer has {len(routed)} rows of a step of {adapted.num_rows}")
    out = torch.empty_like(routed.rows)
    others = torch.ones(len(routed), dtype=torch.bool)
    for adapter, at in groups:
        others[at] = False
        adding = adapter.experts[call.layer].kernels()
        out[at] = runner.run(replace(call.with_rows(_of(routed, at)), adding=adding))
    if bool(others.any()):
        out[others] = runner.run(call.with_rows(_of(routed, others)))
    return out


def _of(routed: Routed, at: Tensor) -> Routed:
    return Routed(routed.rows[at], routed.index[at], routed.weights[at])


def add_to_linear(module: nn.Module, rows: Tensor, out: Tensor, *, row_by_row: bool) -> Tensor:
    """``out`` [..., out] of a linear layer for ``rows`` [..., in], with what adapters add to it.

    Raises RuntimeError if these are not the rows of the step.
    """
    adapted = _step.rows
    if adapted is None:
        return out
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) != adapted.num_rows:
        raise RuntimeError(f"a layer has {len(flat)} rows of a step of {adapted.num_rows}")
    result = out.reshape(len(flat), -1).clone()
    for adapter, at in adapted.groups:
        weights = adapter.linears.get(module)
        if weights is not None:
            added = weights.of(flat[at], row_by_row=row_by_row)
            result[at] = (result[at].float() + added).to(result.dtype)
    return result.view_as(out)

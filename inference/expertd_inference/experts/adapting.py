"""Adapters of the rows of a step: what is added to linear layers and experts, row by row."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
class Adapter:
    """What one adapter adds to a model.

    ``key`` is the same only of the same weights: keys and values are shared by it.
    """

    key: str
    linears: Mapping[nn.Module, LowRankWeights]


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


def adapted_rows() -> AdaptedRows | None:
    """Of what this thread computes."""
    return _step.rows


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

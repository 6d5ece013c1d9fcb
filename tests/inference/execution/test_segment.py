"""A compiled piece, then the rest of a layer, whose result the next segment reads."""

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from expertd_inference.execution.segment import ExpertsRest, ModuleRest, ProgramSegment, Segment
from expertd_inference.kernels.wave import Routed

ROWS, WIDTH = 5, 4


class Noted(Segment):
    """Notes what is called, in order."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        super().__init__(cast("Any", SimpleNamespace(compute=self.compute)))

    def compute(self, num_rows: int) -> Tensor:
        self.calls.append(("rest", num_rows))
        return torch.ones(num_rows)

    def run_piece(self) -> None:
        self.calls.append("piece")

    def read(self, result: Tensor) -> None:
        self.calls.append(("read", len(result)))


def test_a_segment_is_its_piece_then_its_rest() -> None:
    segment = Noted()
    segment.run(3)
    assert segment.calls == ["piece", ("rest", 3), ("read", 3)]
    segment.finish(2)  # the piece has run
    assert segment.calls[3:] == [("rest", 2), ("read", 2)]


class Seat:
    """Calls are numbered; the runner gives the rows of one back."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.runner = SimpleNamespace(run=lambda call: call)

    def prepare(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.call(rows, index, weights, "prepared")

    def call(self, rows: Tensor, index: Tensor, weights: Tensor, how: str = "call") -> Tensor:
        assert len(rows) == len(index) == len(weights)
        self.made.append((how, len(rows)))
        return rows


def test_experts_are_asked_for_the_first_rows_by_calls_that_are_made_once() -> None:
    seat = Seat()
    rows = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH).float()
    routed = Routed(rows, torch.zeros(ROWS, 2, dtype=torch.int64), torch.ones(ROWS, 2))
    rest = ExpertsRest(cast("Any", seat), routed)
    for num_rows in (1, 1, 3, 3, 5, 1, 3):
        assert torch.equal(rest.compute(num_rows), rows[:num_rows])
    # One row's call is prepared; of others the last is kept.
    assert seat.made == [("prepared", 1), ("call", 3), ("call", 5), ("call", 3)]
    rows += 1  # the memory stays, and is read anew
    assert torch.equal(rest.compute(1), rows[:1])


class Doubled(nn.Module):
    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, rows: Tensor) -> Any:
        assert rows.dim() == 3, "as a model calls it"
        assert len(rows) == 1
        result = (2 * rows.double()).mT.contiguous().mT  # of another dtype, not contiguous
        return (result, "router's logits") if self.in_tuple else result


@pytest.mark.parametrize("in_tuple", [False, True])
def test_a_module_is_called_as_the_model_calls_it(*, in_tuple: bool) -> None:
    rows = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH).bfloat16()
    result = ModuleRest(Doubled(in_tuple=in_tuple), rows).compute(3)
    assert torch.equal(result, 2 * rows[:3])
    assert result.is_contiguous()


class Reader(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p),)


def test_the_next_segment_reads_the_last_result() -> None:
    ran: list[int] = []
    program = SimpleNamespace(run=ran.append)
    results = iter([torch.ones(1), torch.ones(1)])
    rest = SimpleNamespace(compute=lambda _: next(results))
    segment = ProgramSegment(cast("Any", program), cast("Any", rest), step=123)
    reader = segment.reader = Reader()
    segment.field = "x"
    for _ in range(2):
        segment.run(1)
        assert segment.result is not None
        assert reader.x == segment.result.data_ptr()
    assert ran == [123, 123]
    # The same tensor is read where it was.
    reader.x = None
    segment.read(segment.result)
    assert reader.x is None

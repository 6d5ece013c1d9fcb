"""A compiled piece of a step, and then what the model computes of one layer: its experts."""

import ctypes
from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn

from expertd_inference.experts.call import ExpertsCall, ExpertsSeat
from expertd_inference.kernels.cpu.program import RowsProgram
from expertd_inference.kernels.wave import Routed


class Rest(Protocol):
    """What is computed after a compiled piece, of memory that stays."""

    def compute(self, num_rows: int) -> Tensor:
        """The result [num_rows, H] for the first rows of that memory."""


class ExpertsRest:
    """The experts of one layer, asked through its seat."""

    def __init__(self, seat: ExpertsSeat, routed: Routed) -> None:
        """``routed`` is memory of the most rows, which the piece before writes."""
        self.seat = seat
        self.routed = routed
        self._one = self.seat.prepare(*(each[:1] for each in self._tensors))
        self._last: tuple[int, ExpertsCall] = 1, self._one

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.routed.rows, self.routed.index, self.routed.weights

    def compute(self, num_rows: int) -> Tensor:
        """As :class:`Rest`; raises what :meth:`.experts.call.ExpertsRunner.run` does."""
        return self.seat.runner.run(self.call_of(num_rows))

    def call_of(self, num_rows: int) -> ExpertsCall:
        """With the rows of a step."""
        if self._last[0] != num_rows:
            call = self._one
            if num_rows > 1:
                call = self.seat.call(*(each[:num_rows] for each in self._tensors))
            self._last = num_rows, call
        return self._last[1]


class ModuleRest:
    """A module that is called as the model calls it, for all rows as if they were one sequence."""

    def __init__(self, module: nn.Module, rows: Tensor) -> None:
        self._module, self._rows = module, rows

    def compute(self, num_rows: int) -> Tensor:
        """As :class:`Rest`; raises what the module does."""
        result: Any = self._module(self._rows[None, :num_rows])
        if isinstance(result, tuple):
            result = result[0]
        rows: Tensor = result.reshape(num_rows, -1)
        return rows.to(self._rows.dtype).contiguous()


class Segment(ABC):
    """One compiled piece, then the rest of a layer; the next segment reads the rest's result.

    The piece is a native program on the CPU, and a recorded graph on a GPU.
    """

    def __init__(self, rest: Rest) -> None:
        self.rest = rest

    def run(self, num_rows: int) -> None:
        """All of it, for the first rows of its memory. Raises what the rest does."""
        self.run_piece()
        self.finish(num_rows)

    def finish(self, num_rows: int) -> None:
        """What is left once the piece has run."""
        self.read(self.rest.compute(num_rows))

    @abstractmethod
    def run_piece(self) -> None:
        """Computes up to the rest."""

    @abstractmethod
    def read(self, result: Tensor) -> None:
        """The next segment reads ``result``, [num_rows, H]."""


class ProgramSegment(Segment):
    """A segment whose piece is one native call."""

    def __init__(self, program: RowsProgram, rest: Rest, step: int) -> None:
        """``step`` is the address of the :class:`.StepCall` that is under way."""
        super().__init__(rest)
        self.program = program
        self.reader: ctypes.Structure | None = None
        """The operation of the next segment that reads the result, and by which field."""
        self.field = ""
        self.result: Tensor | None = None
        """The last one: kept since the next segment reads it."""
        self._step = step

    def run_piece(self) -> None:
        """As :class:`Segment`."""
        self.program.run(self._step)

    def read(self, result: Tensor) -> None:
        """As :class:`Segment`."""
        if result is not self.result:
            self.result = result
            setattr(self.reader, self.field, result.data_ptr())

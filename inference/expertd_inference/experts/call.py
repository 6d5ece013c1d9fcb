"""What a model asks of its experts, in one form, wherever they are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from expertd_inference.kernels.cpu.choice import CpuKernels
from expertd_inference.kernels.cpu.native import PreparedExperts
from expertd_inference.kernels.wave import ExpertsSpec, Routed

_ATTRIBUTE = "_expertd"


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """Rows that enter the experts of one layer, with their routing."""

    layer: int
    """The number of the decoder layer."""
    num_experts: int
    """Of the layer."""
    spec: ExpertsSpec
    routed: Routed
    prepared: PreparedExperts | None = None
    """What a runner has worked out for tensors that stay: see :meth:`ExpertsRunner.prepare`."""

    adding: CpuKernels | None = None
    """What computes rows whose adapter adds to experts, in the place of the runner's kernels."""

    def with_rows(self, routed: Routed) -> "ExpertsCall":
        """The same of other rows."""
        return replace(self, routed=routed, prepared=None)


class ExpertsRunner(Protocol):
    """What computes experts: on the CPU, on a device, in a test."""

    def run(self, call: ExpertsCall, /) -> Tensor:
        """The layer's output [T, H], of the rows' dtype.

        Raises PreconditionError if the model was closed, StepLostError if the whole step has to
        be repeated, and what the session raises once recovering does not help.
        """

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """The call to be run in the place of ``call``, whose tensors stay the very same.

        Only what they hold changes from run to run. The result is good until the next run.
        """


@dataclass(slots=True)
class ExpertsSeat:
    """What an experts module of a model has of ours: which layer it is, and what computes it.

    ``runner`` may be replaced, by whatever stands between a model and its experts for a while.
    """

    runner: ExpertsRunner
    layer: int
    num_experts: int
    spec: ExpertsSpec

    def call(self, rows: Tensor, index: Tensor, weights: Tensor) -> ExpertsCall:
        """``rows`` [T, H], the experts of each, ``index`` [T, k], and their ``weights`` [T, k]."""
        return ExpertsCall(self.layer, self.num_experts, self.spec, Routed(rows, index, weights))

    def prepare(self, rows: Tensor, index: Tensor, weights: Tensor) -> ExpertsCall:
        """As :meth:`call`, for tensors that stay: see :meth:`ExpertsRunner.prepare`."""
        return self.runner.prepare(self.call(rows, index, weights))


def take_seat(module: nn.Module, seat: ExpertsSeat) -> None:
    """From now on the experts ``module`` is computed by what ``seat`` says."""
    setattr(module, _ATTRIBUTE, seat)


def seat_of(module: nn.Module) -> ExpertsSeat:
    """The seat of an experts module. Raises AttributeError if it has none."""
    seat: ExpertsSeat = getattr(module, _ATTRIBUTE)
    return seat


def has_seat(module: Any) -> bool:  # noqa: ANN401 - whatever a model has there
    """Whether it is an experts module that is computed by ours."""
    return hasattr(module, _ATTRIBUTE)


def leave_seat(module: nn.Module) -> None:
    """The module is computed by nothing of ours any more."""
    module.__dict__.pop(_ATTRIBUTE, None)


@contextmanager
def experts_asked_of(
    model: nn.Module, runner_of: Callable[[ExpertsSeat], ExpertsRunner]
) -> Iterator[None]:
    """While each layer's experts are computed by what ``runner_of`` gives for its seat."""
    seats = [seat_of(module) for module in model.modules() if has_seat(module)]
    runners = [seat.runner for seat in seats]
    for seat in seats:
        seat.runner = runner_of(seat)
    try:
        yield
    finally:
        for seat, runner in zip(seats, runners, strict=True):
            seat.runner = runner

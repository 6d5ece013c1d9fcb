"""Experts that the device finds by itself: a step is repeated while one of them is not in RAM."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from expertd_inference.device.gpu_driven import GpuExperts, StepCounts
from expertd_inference.experts.call import ExpertsCall
from expertstore.errors import ExpertdError

MAX_REPEATS = 200
"""Each repeat brings at least the experts of one more layer, and no model has that many."""


class StepStore(Protocol):
    """The session, as a step needs it."""

    @property
    def arena_address(self) -> int:
        """Where the device sees the arena that is attached now; 0 if it does not."""

    def hold(self) -> int:
        """Begins to hold; the address of the directory's first entry in this process."""

    def bring(self, absent: Mapping[int, Sequence[int]]) -> None:
        """Has the daemon make these experts, by layer, resident. Ends the hold."""

    def finished(self, counts: StepCounts) -> None:
        """The device has read all that it will: tells the daemon what was used."""


class WholeExperts:
    """The experts of steps that are one recording each."""

    def __init__(self, experts: GpuExperts, store: StepStore) -> None:
        self._experts, self._store = experts, store

    @property
    def valid(self) -> bool:
        """Whether the arena is where recorded kernels look for it."""
        return self._store.arena_address == self._experts.arena_address

    def fits(self, num_rows: int) -> bool:
        """Whether a step of so many rows can be one recording."""
        return self._experts.fits(num_rows)

    def run(self, call: ExpertsCall, /) -> Tensor:
        """A layer's output [T, H], by the device itself, queued or recorded."""
        return self._experts.run(call)

    def begin_trial(self) -> None:
        """What is run next, outside of a step, is to find no expert in RAM, and to read none."""
        self._experts.begin_trial()

    def until_complete(self, attempt: Callable[[], None]) -> None:
        """Runs a step, as often as it takes. Raises StepLostError, and what the session raises."""
        for _ in range(MAX_REPEATS):
            self._experts.begin_step(self._store.hold())
            attempt()
            counts = self._experts.end_step()
            if not counts.absent:
                self._store.finished(counts)
                return
            self._store.bring(counts.absent)
        raise ExpertdError(
            f"A step was repeated {MAX_REPEATS} times, each time as an expert was not in RAM; "
            "give the daemon more --ram, or this worker --decode-graphs segments."
        )

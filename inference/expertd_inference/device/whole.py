"""The whole step in one recording, repeated while an expert of it is not in RAM."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from expertd_inference.device.gpu_driven import GpuExperts, StepCounts
from expertd_inference.device.recorder import Recorder, Recording
from expertd_inference.experts.call import ExpertsCall
from expertd_inference.settings import DecodeGraphsMode
from expertstore.errors import ExpertdError

MAX_REPEATS = 200
"""Each repeat brings at least the experts of one more layer, and no model has that many."""


class StepStore(Protocol):
    """The session, as a step needs it."""

    @property
    def arena(self) -> int:
        """Where the device sees the arena that is attached now; 0 if it does not."""

    def hold(self) -> int:
        """Begins to hold; the address of the directory's first entry in this process."""

    def bring(self, absent: Mapping[int, Sequence[int]]) -> None:
        """Has the daemon make these experts, by layer, resident. Ends the hold."""

    def finished(self, counts: StepCounts) -> None:
        """The device has read all that it will: tells the daemon what was used."""


class WholeSteps:
    """``experts`` compute while a step runs, ``rewind`` undoes what one has written."""

    def __init__(
        self,
        experts: GpuExperts,
        recorder: Recorder,
        store: StepStore,
        rewind: Callable[[], None],
    ) -> None:
        self._experts, self._recorder, self._store = experts, recorder, store
        self._rewind = rewind
        self._recording: Recording | None = None

    @property
    def mode(self) -> DecodeGraphsMode:
        """Whole."""
        return DecodeGraphsMode.WHOLE

    @property
    def valid(self) -> bool:
        """Whether the arena is where the recorded kernels look for it."""
        return self._store.arena == self._experts.arena

    def run(self, call: ExpertsCall, /) -> Tensor:
        """A layer, by the device itself."""
        return self._experts.run(call)

    def first(self, forward: Callable[[], Tensor]) -> Tensor:
        """Compiles the kernels, which cannot be done while recording."""
        results: list[Tensor] = []
        self._until_complete(lambda: results.append(forward()))
        return results[-1]

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """One recording, then its first replay."""
        with self._recorder.session():
            self._recorder.begin()
            logits = forward()
            self._recording = self._recorder.end()
        self.replay()
        return logits

    def replay(self) -> None:
        """The step, as often as it takes."""
        assert self._recording is not None
        self._until_complete(self._recording.replay)

    def _until_complete(self, attempt: Callable[[], None]) -> None:
        for _ in range(MAX_REPEATS):
            self._experts.begin_step(self._store.hold())
            attempt()
            counts = self._experts.end_step()
            if not counts.absent:
                self._store.finished(counts)
                return
            self._store.bring(counts.absent)
            self._rewind()
        raise ExpertdError(
            f"A step was repeated {MAX_REPEATS} times, each time as an expert was not in RAM; "
            "give the daemon more --ram, or this worker --decode-graphs segments."
        )

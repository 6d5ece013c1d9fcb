"""How many layers to look ahead: as many as tokens are measured to come fastest with.

What a hint costs (asking routers, a packet, a daemon that works on the same cores, a record
evicted for a wrong guess) and what it saves (a wait, if the read ends in time) depends on the
model, the disk and what else the host does. So it is tried: a few tokens with each choice in turn,
then for a long while the best. Plain values; who runs the steps measures them.
"""

import statistics
from collections import deque
from collections.abc import Sequence

BLOCK_STEPS = 5
"""Steps of one choice in a row. The first is not counted: it finds what the last choice left."""
ROUNDS = 3
"""Blocks of each choice in a trial; its order turns, so that what drifts hits all alike."""
MARGIN = 0.97
"""Another choice takes over only if it needs less than this part of the time."""
REST = 8
"""How many times longer than a trial its outcome holds; twice as long each time it is confirmed."""
LONGEST_REST = 64
_MEMORY = 2 * ROUNDS


class Foresight:
    """Chooses among numbers of layers, the first of which has it until another is faster."""

    def __init__(self, choices: Sequence[int]) -> None:
        """One choice is obeyed and not measured. Raises ValueError for none."""
        if not choices:
            raise ValueError("there is nothing to choose from")
        self._choices = tuple(dict.fromkeys(choices))
        self._best = self._choices[0]
        self._blocks: dict[int, deque[float]] = {
            choice: deque(maxlen=_MEMORY) for choice in self._choices
        }
        self._plan = self._new_trial(0)
        self._num_trials = 0
        self._rest = REST
        self._steps_left = 0
        self._block: list[float] = []

    def __repr__(self) -> str:
        return f"Foresight({self.num_layers} layers ahead: {self.why})"

    @property
    def num_layers(self) -> int:
        """For the step that begins now."""
        return self._plan[0] if self._plan else self._best

    @property
    def settled(self) -> bool:
        """Whether a choice stands, for now."""
        return not self._plan

    @property
    def why(self) -> str:
        """A phrase for who asks why it is so many."""
        if len(self._choices) == 1:
            return "as told"
        if not self._num_trials:
            return f"trying {_listed([str(choice) for choice in self._choices])}"
        took = [
            f"{1e3 * self._seconds(choice):.3g} ms with {choice}"
            for choice in sorted(self._choices, key=self._seconds)
        ]
        return f"a token took {_listed(took)}"

    def step_took(self, seconds: float) -> None:
        """A step with :attr:`num_layers`, in which not all was in RAM, has ended."""
        if len(self._choices) == 1:
            return
        if not self._plan:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self._plan = self._new_trial(self._num_trials)
            return
        self._block.append(seconds)
        if len(self._block) < BLOCK_STEPS:
            return
        self._blocks[self._plan.pop(0)].append(statistics.mean(self._block[1:]))
        self._block.clear()
        if not self._plan:
            self._decide()

    def _new_trial(self, number: int) -> list[int]:
        if len(self._choices) == 1:
            return []
        order = []
        for turn in range(number, number + ROUNDS):
            # The choice that costs nothing to be wrong with does not begin: a session may be short.
            first = (turn + 1) % len(self._choices)
            order += [*self._choices[first:], *self._choices[:first]]
        return order

    def _decide(self) -> None:
        self._num_trials += 1
        fastest = min(self._choices, key=self._seconds)
        if self._seconds(fastest) < MARGIN * self._seconds(self._best):
            self._best, self._rest = fastest, REST
        elif self._num_trials > 1:
            self._rest = min(2 * self._rest, LONGEST_REST)
        self._steps_left = self._rest * BLOCK_STEPS * ROUNDS * len(self._choices)

    def _seconds(self, choice: int) -> float:
        """A step's; the median of blocks, since one may have met a pause of the whole host."""
        return statistics.median(self._blocks[choice])


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

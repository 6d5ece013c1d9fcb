"""The states of recurrent layers, of all sequences: a slot each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one state of one sequence: what a layer keeps in place of keys and values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = _CPU


class StateMemory:
    """For each state a tensor [num_slots, *shape]."""

    def __init__(self, shapes: Sequence[StateShape], num_slots: int) -> None:
        self.shapes = tuple(shapes)
        self._states = [
            torch.empty(num_slots, *each.shape, dtype=each.dtype, device=each.device)
            for each in self.shapes
        ]

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return sum(state.numel() * state.element_size() for state in self._states)

    def gather(self, slots: Sequence[int]) -> list[Tensor]:
        """Copies of the states in ``slots``, each [len(slots), *shape]."""
        return [state[list(slots)] for state in self._states]

    def scatter(self, slots: Sequence[int], states: Sequence[Tensor]) -> None:
        """Puts ``states``, as :meth:`gather` gives them, into ``slots``."""
        for here, state in zip(self._states, states, strict=True):
            here[list(slots)] = state

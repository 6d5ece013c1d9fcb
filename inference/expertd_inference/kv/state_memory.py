"""The states of recurrent layers, of all sequences: a slot each."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

_CPU = torch.device("cpu")

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class StateShape:
    """Of one state of one sequence: what a layer keeps in place of keys and values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = _CPU

    @property
    def num_bytes(self) -> int:
        """Of one sequence."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class StateMemory(Generic[Name]):
    """For each state a tensor with two places for each slot.

    A step reads a slot's one place and writes the other, and :meth:`keep` makes the latter the one
    that counts. So a step that is lost has changed nothing.
    """

    states: dict[Name, Tensor]
    """[2 * num_slots, *shape] each. A page takes memory from the first time it is written to."""

    def __init__(self, shapes: Mapping[Name, StateShape], num_slots: int) -> None:
        self.states = {
            name: torch.empty(2 * num_slots, *each.shape, dtype=each.dtype, device=each.device)
            for name, each in shapes.items()
        }
        self._now = [2 * slot for slot in range(num_slots)]

    def now(self, slots: Sequence[int]) -> list[int]:
        """The places that count."""
        return [self._now[slot] for slot in slots]

    def next(self, slots: Sequence[int]) -> list[int]:
        """The places that a step writes to."""
        return [self._now[slot] ^ 1 for slot in slots]

    def gather(self, slots: Sequence[int], names: Collection[Name]) -> dict[Name, Tensor]:
        """Copies of the states of those ``names`` in ``slots``, each [len(slots), *shape].

        That of one slot lies where it is written to, so that what changes it needs no
        :meth:`scatter`.
        """
        if len(slots) == 1:
            copies = {name: self._written(name, slots[0]) for name in names}
            (now,) = self.now(slots)
            for name, copy in copies.items():
                copy.copy_(self.states[name][now : now + 1])
            return copies
        places = torch.tensor(self.now(slots))
        return {
            name: self.states[name].index_select(0, places.to(self.states[name].device))
            for name in names
        }

    def scatter(self, slots: Sequence[int], states: Mapping[Name, Tensor]) -> None:
        """Puts ``states``, as :meth:`gather` gives them, where ``slots`` are written to."""
        if len(slots) == 1:
            for name, state in states.items():
                if (there := self._written(name, slots[0])).data_ptr() != state.data_ptr():
                    there.copy_(state)
            return
        places = torch.tensor(self.next(slots))
        for name, state in states.items():
            here = self.states[name]
            here.index_copy_(0, places.to(here.device), state.to(here.dtype))

    def _written(self, name: Name, slot: int) -> Tensor:
        (place,) = self.next([slot])
        return self.states[name][place : place + 1]

    def keep(self, slots: Sequence[int]) -> None:
        """Makes what was written to ``slots`` the states that count."""
        for slot in slots:
            self._now[slot] ^= 1

"""Which slots for the states of recurrent layers are free."""

from expertstore.errors import InvalidInputError


class StateSlots:
    """Slots that hold what recurrent layers keep of a sequence, one sequence each.

    A state is that of all tokens so far and of no fewer, so two sequences cannot share one, and a
    model with such layers finds no prefix. Pure accounting: it holds no memory.
    """

    def __init__(self, num_slots: int) -> None:
        """Raises InvalidInputError if there is not one slot."""
        if num_slots < 1:
            raise InvalidInputError(
                f"There are {num_slots} slots for recurrent states; give memory for at least one."
            )
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def take(self) -> int | None:
        """A slot, whose contents are anyone's; None if all are taken."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """Frees a slot that was taken."""
        self._free.append(slot)

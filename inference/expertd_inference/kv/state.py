"""Which slots for the states of recurrent layers are free."""


class StateSlots:
    """Slots that hold what recurrent layers keep of a sequence, one sequence each.

    A state is that of all tokens so far and of no fewer, so two sequences cannot share one, and a
    model with such layers finds no prefix. Pure accounting: it holds no memory.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def take(self) -> int:
        """A slot, whose contents are anyone's; there must be a free one."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Frees a slot that was taken."""
        self._free.append(slot)

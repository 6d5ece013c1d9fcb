"""Lets sequences with the same beginning wait for the one that computes it."""

from expertd_inference.engine.sequence import Sequence

MAX_TIMES = 4
"""How often a sequence waits for others: those may be cancelled each time."""


class SharedWork:
    """Blocks that running sequences are about to compute, and the sequences that wait for them.

    So the continuations of one prompt, or the prompts of many clients with one beginning, compute
    it once: the first computes, the others find its blocks.
    """

    def __init__(self) -> None:
        self._leader_of: dict[bytes, int] = {}
        self._names_of: dict[int, list[bytes]] = {}
        self._followers: dict[bytes, list[Sequence]] = {}
        self._num_times: dict[int, int] = {}

    @property
    def num_followers(self) -> int:
        """Sequences that wait."""
        return sum(map(len, self._followers.values()))

    def promise(self, leader: int, names: list[bytes]) -> None:
        """A sequence begins to compute these blocks, but for those that others compute."""
        mine = [name for name in names if name not in self._leader_of]
        self._names_of[leader] = mine
        self._leader_of.update(dict.fromkeys(mine, leader))

    def follow(self, sequence: Sequence, names: list[bytes]) -> bool:
        """Lets it wait for the last of these blocks that is coming, if one is."""
        name = next((name for name in reversed(names) if name in self._leader_of), None)
        times = self._num_times.get(sequence.id, 0)
        if name is None or times == MAX_TIMES:
            return False
        self._num_times[sequence.id] = times + 1
        self._followers.setdefault(name, []).append(sequence)
        return True

    def computed(self, names: list[bytes]) -> list[Sequence]:
        """Those who waited for these blocks, and wait no more."""
        for name in names:
            self._leader_of.pop(name, None)
        return [one for name in names for one in self._followers.pop(name, ())]

    def withdraw(self, leader: int) -> list[Sequence]:
        """Those who waited for what this sequence will not compute any more."""
        names = self._names_of.pop(leader, [])
        return self.computed([name for name in names if self._leader_of.get(name) == leader])

    def forget(self, sequence: Sequence) -> bool:
        """Of one that has finished: whether it waited here."""
        self._num_times.pop(sequence.id, None)
        for followers in self._followers.values():
            if sequence in followers:
                followers.remove(sequence)
                return True
        return False

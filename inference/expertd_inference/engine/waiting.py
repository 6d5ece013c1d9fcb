"""Whose turn it is among the sequences that wait."""

from bisect import insort
from operator import attrgetter

from expertd_inference.engine.sequence import Sequence

OLDEST_EVERY = 4
"""Of so many admissions one is that of the lowest rank, whatever users and priorities say."""
PRIORITY_ARRIVALS = 256
"""How many sequences that come later a priority higher by one goes before, at most."""

_RANK = attrgetter("rank")


class Waiting:
    """Sequences in fair order.

    Preempted ones go first. Of the others the highest priority goes first, then the user with the
    fewest rows computed since it has had something to do, then the first to come (the counters of
    Sheng et al., Fairness in Serving Large Language Models, arXiv 2401.00588). That alone would
    let new users starve an old one, so one admission of ``OLDEST_EVERY`` is that of the lowest
    rank: a sequence's number of arrival, less ``PRIORITY_ARRIVALS`` for each point of priority.
    Only so many sequences ever have a lower rank, so its turn comes, whatever else does.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[str, int], list[Sequence]] = {}
        self._preempted: list[Sequence] = []
        self._rows: dict[str, int] = {}
        self._num_active: dict[str, int] = {}
        self._num_arrived = 0
        self._num_admitted = 0

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._queues.values()))

    def arrive(self, sequence: Sequence) -> None:
        """Gives a new sequence its rank. Pairs with :meth:`leave`."""
        late = self._num_arrived - PRIORITY_ARRIVALS * sequence.priority
        sequence.rank = (late, self._num_arrived)
        self._num_arrived += 1
        user = sequence.user
        if not self._num_active.get(user):
            self._rows[user] = min(self._rows.values(), default=0)
        self._num_active[user] = self._num_active.get(user, 0) + 1

    def leave(self, user: str) -> None:
        """A sequence of ``user`` has finished."""
        self._num_active[user] -= 1
        if not self._num_active[user]:
            del self._num_active[user], self._rows[user]

    def charge(self, user: str, num_rows: int) -> None:
        """Counts rows computed for one of the user's sequences."""
        self._rows[user] += num_rows

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence that has arrived wait."""
        queue = self._queues.setdefault((sequence.user, sequence.priority), [])
        insort(queue, sequence, key=_RANK)

    def add_preempted(self, sequence: Sequence) -> None:
        """Lets one wait that has run already."""
        insort(self._preempted, sequence, key=_RANK)

    def next(self) -> Sequence | None:
        """Whose turn it is; it goes on waiting until it is removed."""
        if self._preempted:
            return self._preempted[0]
        if self._num_admitted % OLDEST_EVERY == 0:
            return min((queue[0] for queue in self._queues.values()), key=_RANK, default=None)
        return min(
            (queue[0] for queue in self._queues.values()),
            key=lambda one: (-one.priority, self._rows[one.user], one.rank),
            default=None,
        )

    def count_admission(self) -> None:
        """The turn passes on."""
        self._num_admitted += 1

    def remove(self, sequence: Sequence) -> None:
        """Of one that waits."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        key = sequence.user, sequence.priority
        self._queues[key].remove(sequence)
        if not self._queues[key]:
            del self._queues[key]

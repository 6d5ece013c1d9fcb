"""Whose turn it is, of those that wait."""

from expertd_inference import GenerationSettings
from expertd_inference.engine.sequence import Origin, Sequence
from expertd_inference.engine.waiting import OLDEST_EVERY, PRIORITY_ARRIVALS, Waiting


class Queue:
    """Sequences that arrive, and are admitted one after the other."""

    def __init__(self) -> None:
        self.waiting = Waiting()
        self.num = 0

    def add(self, user: str = "", priority: int = 0) -> Sequence:
        one = Sequence(self.num, [1], GenerationSettings(), Origin(user=user, priority=priority))
        self.num += 1
        self.waiting.arrive(one)
        self.waiting.add(one)
        return one

    def admit(self) -> Sequence:
        one = self.waiting.next()
        assert one is not None
        self.waiting.remove(one)
        self.waiting.count_admission()
        return one


def begun() -> Queue:
    """The next admissions are those of the highest priority and of fair shares."""
    queue = Queue()
    queue.add()
    queue.admit()
    queue.waiting.leave("")
    return queue


def test_one_admission_of_a_few_is_the_oldest_one() -> None:
    queue = Queue()
    old = [queue.add("old") for _ in range(3)]
    for _ in range(PRIORITY_ARRIVALS):  # else a priority would make those below the oldest
        queue.add("old")
    new = [queue.add("new", priority=1) for _ in range(9)]
    order = [queue.admit() for _ in range(9)]
    assert order == [old[0], *new[:3], old[1], *new[3:6], old[2]]
    assert OLDEST_EVERY == 4


def test_of_one_user_the_first_to_come_goes_first() -> None:
    queue = Queue()
    all_of_it = [queue.add() for _ in range(6)]
    # One that waited for another's prefix waits again, at its place.
    queue.waiting.remove(all_of_it[2])
    queue.waiting.add(all_of_it[2])
    assert [queue.admit() for _ in range(6)] == all_of_it
    assert queue.waiting.next() is None
    assert len(queue.waiting) == 0


def test_the_user_with_fewer_rows_goes_first() -> None:
    queue = begun()
    first, second = queue.add("a"), queue.add("b")
    queue.waiting.charge("a", 2)
    queue.waiting.charge("b", 1)
    assert queue.admit() is second
    assert queue.admit() is first


def test_a_user_that_comes_anew_has_no_credit_from_before() -> None:
    queue = begun()
    busy, busier = queue.add("busy"), queue.add("busier")
    queue.waiting.charge("busy", 100)
    queue.waiting.charge("busier", 200)
    queue.add("new")
    # It counts as if it had had as much as the one with the least.
    queue.waiting.charge("new", 50)
    assert queue.admit() is busy
    # None loses its count as long as it has something to do.
    queue.add("busier")
    queue.waiting.charge("new", 49)
    assert queue.admit().user == "new"
    assert queue.admit() is busier


def test_a_priority_goes_before_so_many_earlier_ones() -> None:
    queue = Queue()
    earlier = [queue.add() for _ in range(2)]
    high = queue.add(priority=1)
    assert high.rank < earlier[0].rank
    for _ in range(PRIORITY_ARRIVALS - 3):
        queue.add()
    later = queue.add(priority=1)
    assert earlier[0].rank < later.rank < earlier[1].rank


def test_preempted_ones_go_before_all_others() -> None:
    queue = Queue()
    first, second = queue.add(), queue.add()
    assert [queue.admit(), queue.admit()] == [first, second]
    queue.add(priority=9)
    queue.waiting.add_preempted(second)
    queue.waiting.add_preempted(first)
    assert len(queue.waiting) == 3
    assert [queue.admit(), queue.admit()] == [first, second]


def test_nothing_is_kept_of_users_that_have_gone() -> None:
    queue = Queue()
    for _ in range(2):
        queue.add("a")
    queue.waiting.leave("a")
    queue.waiting.charge("a", 1)
    queue.waiting.leave("a")
    assert not queue.waiting._rows
    assert not queue.waiting._num_active

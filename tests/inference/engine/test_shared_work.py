"""Who waits for whose blocks."""

from expertd_inference import GenerationSettings
from expertd_inference.engine.sequence import Sequence
from expertd_inference.engine.shared_work import MAX_TIMES, SharedWork


def sequence(id: int = 0) -> Sequence:  # noqa: A002
    return Sequence(id, [1], GenerationSettings())


def test_none_waits_for_others_without_end() -> None:
    work, one = SharedWork(), sequence()
    for leader in range(MAX_TIMES):
        work.promise(leader, [b"a", b"b"])
        assert work.follow(one, [b"a", b"b", b"c"])
        assert work.computed([b"a"]) == []  # it waits for the last that is coming
        assert work.withdraw(leader) == [one]
    work.promise(99, [b"a"])
    assert not work.follow(one, [b"a"])


def test_a_block_that_two_compute_is_the_first_ones() -> None:
    work, one, other = SharedWork(), sequence(0), sequence(1)
    work.promise(10, [b"a"])
    work.promise(11, [b"a", b"b"])
    assert work.follow(one, [b"a"])
    assert work.follow(other, [b"b"])
    assert work.withdraw(11) == [other]
    assert work.withdraw(10) == [one]


def test_a_block_that_was_dropped_is_anothers() -> None:
    work, one = SharedWork(), sequence()
    work.promise(10, [b"a"])
    assert work.computed([b"a"]) == []
    work.promise(11, [b"a"])
    assert work.follow(one, [b"a"])
    assert work.withdraw(10) == []
    assert work.num_followers == 1
    assert work.withdraw(11) == [one]


def test_one_that_has_finished_waits_no_more() -> None:
    work, one, other = SharedWork(), sequence(0), sequence(1)
    work.promise(10, [b"a"])
    assert work.follow(one, [b"a"])
    assert work.follow(other, [b"a"])
    assert work.forget(one)
    assert not work.forget(one)
    assert work.num_followers == 1
    assert work.computed([b"a"]) == [other]

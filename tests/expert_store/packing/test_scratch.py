"""Memory is used again, and never twice at once."""

from expertd.packing.scratch import Scratch


def test_what_is_taken_is_apart_until_the_reset() -> None:
    scratch = Scratch()
    one, other = scratch.take(100), scratch.take(100)
    one.fill_(1)
    other.fill_(2)
    assert one.unique().tolist() == [1]


def test_a_reset_makes_buffers_free_and_the_smallest_that_fits_is_taken() -> None:
    scratch = Scratch()
    places = {size: scratch.take(size).data_ptr() for size in (1000, 10, 100)}
    scratch.reset()
    assert scratch.take(90).data_ptr() == places[100]
    assert scratch.take(90).data_ptr() == places[1000]
    assert scratch.take(10).data_ptr() == places[10]


def test_buffers_do_not_pile_up() -> None:
    scratch = Scratch()
    for size in range(1, 200):
        scratch.take(size)
        scratch.take(0)
        scratch.reset()
    assert len(scratch._free) == 2

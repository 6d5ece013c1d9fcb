"""Which rows stay, and that a reader never takes another row's bytes for its own."""

import numpy as np
import pytest
from numpy.typing import NDArray

from expertd.tables.row_slots import RowSlots
from expertstore.shared.row_cache import MAX_ROWS, WAYS, RowPlaces, sets_for, sets_in

ROW_BYTES = 24
NUM_SETS = 4


def slots(num_sets: int = NUM_SETS) -> RowSlots:
    places = RowPlaces(4096, num_sets, ROW_BYTES)
    return RowSlots(memoryview(bytearray(4096 + places.num_bytes)), places)


def rows(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def data(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.repeat(numbers.astype(np.uint8)[:, None], ROW_BYTES, axis=1)


def put(cache: RowSlots, *numbers: int) -> None:
    cache.put(rows(*numbers), data(rows(*numbers)))


def test_rows_are_found_as_they_were_put() -> None:
    cache = slots()
    put(cache, 5, 1, 9, 0, 255)
    assert cache.missing(rows(0, 2, 9)).tolist() == [False, True, False]
    assert (cache.copy(rows(9, 5, 9)) == data(rows(9, 5, 9))).all()
    assert cache.num_resident == 5
    with pytest.raises(ValueError, match="not resident"):
        cache.copy(rows(2))


def test_the_longest_unused_of_a_set_goes() -> None:
    cache = slots()
    of_one_set = [NUM_SETS * number for number in range(WAYS)]
    put(cache, *of_one_set)
    put(cache, 1, 2, 3)  # of other sets
    assert cache.touch(rows(of_one_set[0])) == 1
    put(cache, NUM_SETS * WAYS, NUM_SETS * (WAYS + 1))
    assert cache.num_evicted == 2
    gone = cache.missing(rows(*of_one_set))
    assert np.flatnonzero(gone).tolist() == [1, 2], "not the first, which was used"
    assert not cache.missing(rows(1, 2, 3)).any()


def test_more_of_a_set_than_it_holds() -> None:
    cache = slots()
    many = rows(*(NUM_SETS * number for number in range(3 * WAYS)))
    cache.put(many, data(many))
    here = many[~cache.missing(many)]
    assert len(here) == WAYS
    assert (cache.copy(here) == data(here)).all()


def test_all_rows_of_a_small_table_have_room() -> None:
    cache = slots(sets_for(100))
    put(cache, *range(100))
    assert cache.num_resident == 100
    assert cache.num_evicted == 0


def test_the_last_row_that_a_tag_can_name() -> None:
    cache = slots()
    last = rows(MAX_ROWS - 1)
    cache.put(last, data(last))
    assert not cache.missing(last).any()


def test_what_takes_a_rows_place_has_another_tag() -> None:
    """Also when the same row comes back: a reader may have copied what was there between."""
    cache = slots(1)
    put(cache, *range(WAYS))
    before = cache._tags.copy()
    put(cache, WAYS)  # takes the place of row 0
    cache.touch(rows(*range(1, WAYS)))
    put(cache, 0)  # and row 0 its own again
    assert (cache._tags[0] == before[0]).sum() == WAYS - 1


@pytest.mark.parametrize("num_bytes", [0, 8191, 20_000, 1 << 20])
def test_sets_fit_into_what_they_are_given(num_bytes: int) -> None:
    found = RowPlaces(0, sets_in(num_bytes, ROW_BYTES), ROW_BYTES)
    assert found.num_sets == 0 or found.num_bytes <= num_bytes

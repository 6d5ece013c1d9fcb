"""Moving what is kept until the rest is one piece, without ever copying onto itself."""

from hypothesis import assume, given
from hypothesis import strategies as st

from expertd.hosting.compaction import next_move
from expertd.memory.extents import PAGE_BYTES, Extent


def _extent(start: int, pages: int) -> Extent:
    return Extent(start * PAGE_BYTES, pages * PAGE_BYTES)


def test_the_first_gap_is_filled() -> None:
    kept = [_extent(0, 2), _extent(4, 2), _extent(9, 2)]
    assert next_move(kept, 12 * PAGE_BYTES) == (1, _extent(2, 2))
    kept = [_extent(0, 2), _extent(4, 4), _extent(9, 2)]
    assert next_move(kept, 15 * PAGE_BYTES) == (2, _extent(2, 2))


def test_the_only_window_is_not_filled() -> None:
    # Were the small one moved to 0, the large one could not move any more.
    assert next_move([_extent(2, 2), _extent(4, 1)], 5 * PAGE_BYTES) == (0, _extent(0, 2))


def test_who_fits_no_gap_below_makes_way_first() -> None:
    kept = [_extent(1, 4), _extent(6, 4)]
    assert next_move(kept, 14 * PAGE_BYTES) == (0, _extent(10, 4))
    assert next_move([_extent(6, 4), _extent(10, 4)], 14 * PAGE_BYTES) == (0, _extent(0, 4))


def test_nothing_to_do() -> None:
    assert next_move([], PAGE_BYTES) is None
    assert next_move([_extent(0, 2), _extent(2, 1)], 9 * PAGE_BYTES) is None


def test_no_hole_to_begin_with() -> None:
    assert next_move([_extent(1, 4), _extent(6, 4)], 11 * PAGE_BYTES) is None


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=12),
    tail=st.integers(0, 6),
)
def test_all_get_packed_if_one_hole_is_as_large_as_the_largest(
    rows: list[tuple[int, int]], tail: int
) -> None:
    kept, end = [], 0
    for gap, pages in rows:
        kept.append(_extent(end + gap, pages))
        end += gap + pages
    total = (end + tail) * PAGE_BYTES
    assume(max(tail, *(gap for gap, _ in rows)) >= max(pages for _, pages in rows))
    for _ in range(2 * len(kept)):
        move = next_move(kept, total)
        if move is None:
            break
        start, stop = move.target.offset, sum(move.target)
        assert 0 <= start < stop <= total
        assert move.target.num_bytes == kept[move.number].num_bytes
        assert all(sum(other) <= start or other.offset >= stop for other in kept), "it overlaps"
        kept[move.number] = move.target
        kept.sort()
    assert next_move(kept, total) is None
    assert kept[-1].offset + kept[-1].num_bytes == sum(extent.num_bytes for extent in kept)

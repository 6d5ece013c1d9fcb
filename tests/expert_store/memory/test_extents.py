"""The arena's allocator: nothing overlaps, nothing is lost, what fits is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.memory.extents import PAGE_BYTES, Extent, Extents


@given(
    total=st.integers(1, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 8), st.randoms()), max_size=60),
)
def test_extents_partition_the_arena(total: int, steps: list) -> None:
    extents = Extents(total * PAGE_BYTES)
    taken: list[Extent] = []
    for allocate, pages, random in steps:
        if allocate:
            extent = extents.allocate(pages * PAGE_BYTES)
            if extent is not None:
                taken.append(extent)
            else:
                assert _largest_hole(total, taken) < pages
        elif taken:
            extents.free(taken.pop(random.randrange(len(taken))))
        used = [page for extent in taken for page in _pages(extent)]
        assert len(used) == len(set(used)), "two extents overlap"
        assert extents.bytes_used == len(used) * PAGE_BYTES
        assert extents.bytes_free + extents.bytes_used == total * PAGE_BYTES


def test_free_space_joins_again() -> None:
    extents = Extents(6 * PAGE_BYTES)
    small = [extents.allocate(PAGE_BYTES) for _ in range(6)]
    for index in (0, 2, 4, 5, 3, 1):
        extents.free(small[index])
    assert extents.allocate(6 * PAGE_BYTES) == Extent(0, 6 * PAGE_BYTES)


def test_freeing_twice_is_a_bug_that_shows() -> None:
    extents = Extents(4 * PAGE_BYTES)
    extent = extents.allocate(2 * PAGE_BYTES)
    extents.free(extent)
    with pytest.raises(ValueError, match="free already"):
        extents.free(extent)


@given(total=st.integers(1, 12), wanted=st.lists(st.tuples(st.integers(0, 13), st.integers(1, 5))))
def test_what_is_taken_was_free(total: int, wanted: list[tuple[int, int]]) -> None:
    extents = Extents(total * PAGE_BYTES)
    used: set[int] = set()
    for start, pages in wanted:
        extent = Extent(start * PAGE_BYTES, pages * PAGE_BYTES)
        if used.isdisjoint(_pages(extent)) and start + pages <= total:
            extents.take(extent)
            used.update(_pages(extent))
        else:
            with pytest.raises(ValueError, match="is not free"):
                extents.take(extent)
        assert extents.bytes_used == len(used) * PAGE_BYTES
    for page in used:
        extents.free(Extent(page * PAGE_BYTES, PAGE_BYTES))
    assert extents.allocate(total * PAGE_BYTES) == Extent(0, total * PAGE_BYTES)


@pytest.mark.parametrize("extent", [Extent(1, PAGE_BYTES), Extent(0, 5), Extent(PAGE_BYTES, 0)])
def test_only_whole_pages_are_taken(extent: Extent) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        Extents(4 * PAGE_BYTES).take(extent)


def test_only_whole_pages() -> None:
    with pytest.raises(ValueError, match="multiple"):
        Extents(4 * PAGE_BYTES).allocate(100)


def _pages(extent: Extent) -> range:
    start = extent.offset // PAGE_BYTES
    return range(start, start + extent.num_bytes // PAGE_BYTES)


def _largest_hole(total: int, taken: list[Extent]) -> int:
    used = {page for extent in taken for page in _pages(extent)}
    longest = run = 0
    for page in range(total):
        run = 0 if page in used else run + 1
        longest = max(longest, run)
    return longest

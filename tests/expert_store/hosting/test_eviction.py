"""What is evicted for records of other sizes: neighbours, the coldest that make room."""

from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertd.hosting.eviction import choose_victims
from expertd.memory.extents import PAGE_BYTES, Extent, Extents


def _choose(
    sizes: list[int], pages: list[int], coldest: list[int], free: frozenset[int] = frozenset()
) -> set[int] | None:
    """Of records of so many ``pages`` side by side; ``coldest`` are the evictable, in order."""
    offsets = np.cumsum([0, *pages])[:-1] * PAGE_BYTES
    lengths = np.array(pages) * PAGE_BYTES
    loose = [Extent(int(offsets[index]), int(lengths[index])) for index in sorted(free)]
    order = np.array(coldest, np.int64)
    victims = choose_victims(
        [size * PAGE_BYTES for size in sizes], loose, offsets[order], lengths[order]
    )
    return None if victims is None else {coldest[index] for index in victims}


def test_of_one_size_the_coldest_go() -> None:
    assert _choose([1, 1], [1] * 6, [4, 0, 2, 5, 1, 3]) == {4, 0}


def test_for_a_larger_one_the_coldest_neighbours() -> None:
    # 4 0 2 5 are no neighbours but 4 and 5; 1 and 3 are hotter.
    assert _choose([2], [1] * 6, [4, 0, 2, 5, 1, 3]) == {4, 5}


def test_what_is_free_beside_them_counts() -> None:
    assert _choose([2], [1] * 6, [4, 0, 2, 5], frozenset({1})) == {0}
    assert _choose([1], [1] * 6, [4, 0, 2, 5], frozenset({1})) == set()


def test_only_what_lies_in_the_way_goes() -> None:
    # Three must be considered for two neighbours; the coldest of all is not one of them.
    assert _choose([2], [1] * 6, [0, 3, 4]) == {3, 4}


def test_none_if_what_is_kept_lies_between() -> None:
    assert _choose([2], [1] * 5, [0, 2, 4]) is None
    assert _choose([1], [1] * 5, []) is None


records = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from(["kept", "evictable", "free"])), max_size=24
)


@given(
    records=records,
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    random=st.randoms(use_true_random=False),
)
def test_what_is_chosen_makes_room_and_no_colder_set_would(
    records: list, sizes: list[int], random: Random
) -> None:
    pages = [size for size, _ in records]
    evictable = [index for index, (_, kind) in enumerate(records) if kind == "evictable"]
    free = frozenset(index for index, (_, kind) in enumerate(records) if kind == "free")
    random.shuffle(evictable)
    chosen = _choose(sizes, pages, evictable, free)
    if chosen is None:
        assert not _fits(sizes, pages, free | set(evictable))
        return
    assert _fits(sizes, pages, free | chosen)
    if chosen:
        hottest = max(map(evictable.index, chosen))
        assert not _fits(sizes, pages, free | set(evictable[:hottest]))


def _fits(sizes: list[int], pages: list[int], free: frozenset[int] | set[int]) -> bool:
    """Asks the allocator."""
    extents = Extents(sum(pages) * PAGE_BYTES)
    for index, size in enumerate(pages):
        if index not in free:
            extents.take(Extent(sum(pages[:index]) * PAGE_BYTES, size * PAGE_BYTES))
    return extents.allocate_all([size * PAGE_BYTES for size in sizes]) is not None

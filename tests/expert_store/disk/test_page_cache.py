"""What mapped reads leave in the page cache: dropped in the order in which it was read."""

from expertd.disk.page_cache import PageCache


class File:
    def __init__(self) -> None:
        self.dropped: list[tuple[int, int]] = []

    def forget(self, offset: int, num_bytes: int) -> None:
        self.dropped.append((offset, num_bytes))


def test_what_was_read_longest_ago_goes_first() -> None:
    cache, one, two = PageCache(30), File(), File()
    cache.keep(one, [(0, 10)])
    cache.keep(two, [(50, 10)])
    cache.keep(one, [(20, 10)])
    assert (cache.num_bytes, cache.bytes_of([one]), cache.bytes_of([two])) == (30, 20, 10)
    cache.keep(one, [(0, 10)])  # once more: the newest now
    cache.keep(two, [(90, 10)])
    assert (one.dropped, two.dropped) == ([], [(50, 10)])
    cache.keep(two, [(70, 5)])
    assert one.dropped == [(20, 10)]
    assert repr(cache) == "PageCache(25 of 30 bytes)"


def test_neighbours_are_dropped_together_but_no_more_than_must_be() -> None:
    cache, file, other = PageCache(40), File(), File()
    cache.keep(file, [(0, 10), (10, 10), (20, 10), (30, 10)])
    cache.keep(other, [(0, 15)])
    assert file.dropped == [(0, 20)]
    assert cache.num_bytes == 35


def test_more_than_the_bound_at_once_leaves_nothing() -> None:
    cache, file = PageCache(0), File()
    cache.keep(file, [(0, 10), (10, 10)])
    assert file.dropped == [(0, 20)]
    assert cache.num_bytes == cache.bytes_of([file]) == 0


def test_a_closed_file_counts_no_more() -> None:
    cache, kept, dropped, other = PageCache(100), File(), File(), File()
    for file in (kept, dropped, other):
        cache.keep(file, [(0, 10), (40, 10)])
    cache.remove(kept)
    cache.remove(kept)
    cache.remove(dropped, drop=True)
    assert (kept.dropped, dropped.dropped) == ([], [(0, 10), (40, 10)])
    assert cache.num_bytes == cache.bytes_of([kept, dropped, other]) == 20

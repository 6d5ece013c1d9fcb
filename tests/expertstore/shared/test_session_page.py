"""The session page: what a worker writes is what the daemon reads, in the right order."""

import pytest

from expertstore.shared.session_page import MISSED, PAGE_BYTES, SessionPage, session_page_bytes

RING = 8


def _buffer() -> memoryview:
    return memoryview(bytearray(session_page_bytes(RING)))


@pytest.fixture
def page() -> SessionPage:
    return SessionPage.format(_buffer(), epoch=7)


def test_a_fresh_page_is_quiescent(page: SessionPage) -> None:
    assert page.epoch == 7
    assert (page.released_fetch, page.num_touches, page.num_misses) == (0, 0, 0)
    assert not page.revoked
    assert page.ring_entries == len(page.ring) == RING


def test_both_sides_see_one_page() -> None:
    buffer = _buffer()
    daemon = SessionPage.format(buffer, 1)
    worker = SessionPage(buffer)
    worker.epoch, worker.released_fetch = 2**64 - 1, 3
    worker.touch([5])
    daemon.revoke()
    assert (daemon.epoch, daemon.released_fetch, daemon.num_touches) == (2**64 - 1, 3, 1)
    assert worker.revoked


@pytest.mark.parametrize("word", [0, 1])
def test_a_foreign_page_is_refused(word: int) -> None:
    buffer = _buffer()
    SessionPage.format(buffer, 1)
    buffer[:PAGE_BYTES].cast("Q")[word] = 99
    with pytest.raises(ValueError, match="not a session page"):
        SessionPage(buffer)


def test_touches_wrap_and_mark_what_was_missed(page: SessionPage) -> None:
    page.touch([1, 2, 3], frozenset({2}))
    page.touch([4, 5, 6])
    page.touch([7, 8, 9, 2], frozenset({2, 9}))
    assert list(page.ring) == [9 | MISSED, 2 | MISSED, 3, 4, 5, 6, 7, 8]
    assert (page.num_touches, page.num_misses) == (10, 3)


def test_more_touches_than_the_ring_holds(page: SessionPage) -> None:
    page.touch(list(range(20)))
    assert page.num_touches == 20
    assert [page.ring[i % RING] for i in range(12, 20)] == list(range(12, 20))


def test_the_worker_counts_after_the_ring_and_misses_last() -> None:
    """What the daemon may see in between: never an unwritten touch, never too many misses."""
    buffer = _buffer()
    page = SessionPage.format(buffer, 1)
    seen: list[tuple[int, int, int]] = []

    class Watched:
        """The page's words; every store into them is followed by a look at all."""

        def __init__(self, words: memoryview) -> None:
            self._words = words

        def __getitem__(self, index: int) -> int:
            word: int = self._words[index]
            return word

        def __setitem__(self, index: int, value: int) -> None:
            seen.append((page.ring[0], self._words[4], self._words[5]))
            self._words[index] = value
            seen.append((page.ring[0], self._words[4], self._words[5]))

    page._words = Watched(page._words)  # type: ignore[assignment]
    page.touch([3], frozenset({3}))
    assert all(ring == 3 | MISSED for ring, _, _ in seen), "counted before it was written"
    assert all(misses <= touches for _, touches, misses in seen)
    assert seen[-1][1:] == (1, 1)

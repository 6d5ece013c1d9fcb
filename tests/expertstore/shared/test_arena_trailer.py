"""The arena's trailer: which arena, and whose sessions are void."""

import pytest

from expertstore.shared.arena_trailer import NOBODY, TRAILER_BYTES, ArenaTrailer


@pytest.fixture
def words() -> memoryview:
    return memoryview(bytearray(TRAILER_BYTES)).cast("Q")


def test_a_new_arena_is_of_nobody_before(words: memoryview) -> None:
    trailer = ArenaTrailer.format(words)
    assert (trailer.adoptions, trailer.reused_by) == (0, 0)
    trailer.begin_reuse()
    assert trailer.reused_by == 0  # its own sessions have number 0


def test_every_adoption_has_a_number_of_its_own(words: memoryview) -> None:
    trailer = ArenaTrailer.format(words)
    numbers = []
    for reuses in (False, False, True, False, True):
        trailer.adopt()
        numbers.append(trailer.adoptions)
        before = trailer.reused_by
        if reuses:
            trailer.begin_reuse()
        assert trailer.reused_by == (trailer.adoptions if reuses else before)
    assert numbers == [1, 2, 3, 4, 5]


def test_a_retired_arena_is_nobodys(words: memoryview) -> None:
    trailer = ArenaTrailer.format(words)
    trailer.adopt()
    trailer.retire()
    assert trailer.reused_by == NOBODY > trailer.adoptions


def test_ids_differ() -> None:
    ids = {ArenaTrailer.format(memoryview(bytearray(TRAILER_BYTES)).cast("Q")).id for _ in range(9)}
    assert len(ids) == 9


@pytest.mark.parametrize("word", [0, 1])
def test_another_format_is_refused(words: memoryview, word: int) -> None:
    ArenaTrailer.format(words)
    words[word] ^= 1
    with pytest.raises(ValueError, match="not an arena"):
        ArenaTrailer(words)


def test_a_reader_cannot_write(words: memoryview) -> None:
    ArenaTrailer.format(words)
    with pytest.raises(TypeError):
        ArenaTrailer(words.toreadonly()).adopt()


def test_a_part_of_a_page_is_no_trailer() -> None:
    with pytest.raises(ValueError, match="not an arena"):
        ArenaTrailer(memoryview(bytearray(64)).cast("Q"))

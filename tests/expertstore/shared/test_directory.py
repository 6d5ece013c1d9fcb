"""Directory words and the directory's format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstore.shared.directory import (
    ABSENT,
    PAGE_BYTES,
    Directory,
    DirectoryView,
    Location,
    directory_bytes,
    pack_word,
    unpack_word,
)

pages = st.integers(0, 2**32 - 2)
generations = st.integers(0, 2**32 - 1)


@given(pages, generations)
def test_words_round_trip_and_are_never_absent(page: int, generation: int) -> None:
    word = pack_word(page * PAGE_BYTES, generation)
    assert ABSENT < word < 2**64
    assert unpack_word(word) == Location(page * PAGE_BYTES, generation)


def test_absent_is_nowhere() -> None:
    assert unpack_word(ABSENT) is None


@given(st.integers(1, 700), st.data())
def test_a_view_sees_what_the_directory_publishes(num_entries: int, data: st.DataObject) -> None:
    words = _words(num_entries)
    directory = Directory.format(words, num_entries)
    view = DirectoryView(words.toreadonly())
    expected = dict.fromkeys(range(num_entries), ABSENT)
    for entry in data.draw(st.lists(st.integers(0, num_entries - 1), max_size=20)):
        if expected[entry]:
            directory.withdraw(entry)
            expected[entry] = ABSENT
        else:
            expected[entry] = pack_word(entry * PAGE_BYTES, 7)
            directory.publish(entry, expected[entry])
    assert {entry: view.word(entry) for entry in expected} == expected
    assert view.num_entries == num_entries


def test_epochs_only_grow() -> None:
    directory = Directory.format(_words(1), 1)
    assert [directory.epoch, directory.advance_epoch(), directory.epoch] == [1, 2, 2]


def test_a_foreign_table_is_refused() -> None:
    with pytest.raises(ValueError, match="not a directory"):
        DirectoryView(_words(1))


def test_a_reader_cannot_write() -> None:
    words = _words(1)
    Directory.format(words, 1)
    with pytest.raises(TypeError):
        Directory(words.toreadonly()).publish(0, 1)


def _words(num_entries: int) -> memoryview:
    return memoryview(bytearray(directory_bytes(num_entries))).cast("Q")

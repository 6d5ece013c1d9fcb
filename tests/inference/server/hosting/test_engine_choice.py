"""Which engine gets a sequence."""

import pytest

from expertd_inference.engine.prefix import block_names
from expertd_inference.server.hosting.engine_choice import (
    SEQUENCE_TOKENS,
    EngineLoad,
    KnownPrefixes,
    choose_engine,
    find_relief,
)

BLOCKS = SEQUENCE_TOKENS // 64
"""A prefix of so many is worth as much as one sequence less."""


def loads(*num_sequences: int, places: int = 8) -> list[EngineLoad]:
    return [EngineLoad(number, places) for number in num_sequences]


@pytest.mark.parametrize(
    ("num_sequences", "num_matched", "chosen"),
    [
        ((0, 0), (0, 0), 0),
        ((1, 0), (0, 0), 1),
        ((1, 0), (BLOCKS + 1, 0), 0),
        ((1, 0), (BLOCKS - 1, 0), 1),
        ((3, 3), (0, 1), 1),
        ((8, 7), (1000, 0), 1),  # a place at once goes before any prefix
        ((9, 8), (0, 0), 1),
        ((9, 8), (100, 0), 0),  # without one the prefix counts again
        ((2, 1, 1), (0, 0, 1), 2),
    ],
)
def test_the_engine_with_the_fewest_rows_to_compute(
    num_sequences: tuple[int, ...], num_matched: tuple[int, ...], chosen: int
) -> None:
    assert choose_engine(loads(*num_sequences), num_matched) == chosen


def test_of_equal_engines_the_one_with_the_emptiest_memory() -> None:
    assert choose_engine([EngineLoad(0, 8, 5), EngineLoad(0, 8, 2)], (0, 0)) == 1


@pytest.mark.parametrize(
    ("num_sequences", "found"),
    [
        ((9,), None),
        ((8, 0), None),
        ((9, 8), None),
        ((9, 7), (0, 1)),
        ((0, 9, 12, 3), (2, 0)),
    ],
)
def test_those_that_wait_go_where_a_place_is(
    num_sequences: tuple[int, ...], found: tuple[int, int] | None
) -> None:
    assert find_relief(loads(*num_sequences)) == found


def test_a_prefix_is_known_from_its_beginning_on() -> None:
    known = KnownPrefixes(8)
    known.remember([b"a", b"b", b"c"])
    assert known.match([b"a", b"b", b"x", b"c"]) == 2
    assert known.match([b"b", b"c"]) == 2
    assert known.match([b"x", b"a"]) == 0


def test_the_blocks_used_last_are_known_and_ends_are_forgotten_first() -> None:
    known = KnownPrefixes(4)
    known.remember([b"a", b"b", b"c"])
    known.remember([b"A", b"B"])
    assert len(known) == 4
    assert known.match([b"a", b"b", b"c"]) == 2
    known.remember([b"a"])
    known.remember([b"1", b"2"])
    assert (known.match([b"a", b"b"]), known.match([b"A", b"B"])) == (1, 1)


def test_names_say_all_that_came_before() -> None:
    tokens = [*range(192)]
    names = block_names(tokens, "", 3)
    assert len({*names, *block_names(tokens, "salt", 3)}) == 6
    assert block_names(tokens, "", 2) == names[:2]
    assert block_names([7, *tokens[1:]], "", 3)[1:] != names[1:]

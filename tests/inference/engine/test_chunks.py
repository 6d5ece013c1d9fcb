"""Where chunks of prompts end."""

import pytest

from expertd_inference import GenerationSettings
from expertd_inference.engine.chunks import chunk_end, decodes
from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.engine.sequence import Sequence

PACKED = SchedulerLimits()
RECURRENT = SchedulerLimits(mixed=False, replays_rows=True)
WHOLE = SchedulerLimits(max_spans=1, whole_prompts=True)


def turning(point: int) -> SchedulerLimits:
    return SchedulerLimits(turning_point=point)


def sequence(num_prompt: int, num_new: int = 0, num_computed: int = 0) -> Sequence:
    made = Sequence(0, [1] * num_prompt, GenerationSettings())
    made.tokens += [2] * num_new
    made.num_computed = num_computed
    return made


def long_or_not(one: Sequence, limits: SchedulerLimits) -> Sequence:
    if limits.turning_point is not None and len(one.tokens) > limits.turning_point:
        one.become_long()
    return one


@pytest.mark.parametrize(
    ("limits", "num_prompt", "num_new", "begin", "num_rows", "end"),
    [
        (PACKED, 100, 0, 0, 100, 100),
        (PACKED, 200, 0, 0, 199, 192),  # a multiple of a block
        (PACKED, 200, 0, 64, 100, 128),
        (PACKED, 200, 0, 0, 40, 40),  # too few for a block
        (PACKED, 193, 0, 0, 192, 128),  # a last chunk of one row is a waste
        (PACKED, 65, 0, 0, 64, 64),  # if there is no other way
        (PACKED, 100, 30, 0, 130, 130),  # after a preemption
        (RECURRENT, 65, 0, 0, 64, 65),  # one row too many rather than a last one alone
        (RECURRENT, 193, 0, 0, 192, 128),
        (RECURRENT, 200, 0, 64, 40, 64),  # none rather than another place
        (RECURRENT, 100, 30, 0, 200, 100),  # what was generated comes a row a step
        (WHOLE, 1000, 0, 0, 64, 1000),
        # A long text's chunk ends behind the turning point, however few rows there are.
        (turning(100), 300, 0, 0, 20, 128),
        (turning(100), 300, 0, 64, 20, 128),
        (turning(126), 300, 0, 0, 20, 128),
        (turning(127), 300, 0, 0, 20, 128),
        (turning(128), 300, 0, 0, 20, 192),
        (turning(100), 300, 0, 128, 20, 148),
        (turning(100), 90, 0, 0, 20, 20),  # not a long text
        (turning(64), 129, 0, 0, 128, 128),  # a last chunk of one row: else it ended before
    ],
)
def test_where_a_chunk_ends(
    limits: SchedulerLimits, num_prompt: int, num_new: int, begin: int, num_rows: int, end: int
) -> None:
    one = long_or_not(sequence(num_prompt, num_new, begin), limits)
    assert chunk_end(one, limits, num_rows, first=True) == end


def test_what_takes_more_rows_waits_to_be_the_first_of_a_batch() -> None:
    assert chunk_end(sequence(10), WHOLE, 64, first=False) == 0
    limits = turning(100)
    assert chunk_end(long_or_not(sequence(300), limits), limits, 64, first=False) == 0
    further = long_or_not(sequence(300, num_computed=128), limits)
    assert chunk_end(further, limits, 64, first=False) == 192


@pytest.mark.parametrize(
    ("limits", "num_new", "num_computed", "expected"),
    [
        (PACKED, 0, 9, False),  # the last row of a prompt
        (PACKED, 1, 10, True),
        (PACKED, 5, 10, False),
        (RECURRENT, 5, 9, False),
        (RECURRENT, 5, 10, True),
    ],
)
def test_what_is_decoding(
    limits: SchedulerLimits, num_new: int, num_computed: int, *, expected: bool
) -> None:
    assert decodes(sequence(10, num_new, num_computed), limits) is expected

"""Accesses become rows and steps, and a replay of them asks for the same."""

from hypothesis import given
from hypothesis import strategies as st

from expertd.traces.recorder import TraceRecorder
from expertstore.trace import Phase, Row, TraceModel

LAYERS, EXPERTS = 3, 6
MODEL = TraceModel((EXPERTS,) * LAYERS, (2,) * LAYERS, tuple(range(LAYERS)))


def record(*batches: tuple[int, list[int]], model: TraceModel = MODEL) -> list[Row]:
    rows: list[Row] = []
    recorder = TraceRecorder(model, rows.append)
    for session, entries in batches:
        recorder.take(session, entries)
    recorder.finish()
    return rows


def entry(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert


used = st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted)
steps = st.lists(st.lists(used, min_size=LAYERS, max_size=LAYERS), max_size=8)


@given(steps, st.integers(1, 7))
def test_steps_come_back_however_the_ring_was_read(tokens: list, size: int) -> None:
    entries = [
        entry(layer, expert)
        for token in tokens
        for layer, experts in enumerate(token)
        for expert in experts
    ]
    rows = record(*((7, entries[i : i + size]) for i in range(0, len(entries), size)))
    expected = [
        Row(
            Phase.PREFILL if max(map(len, token)) > 2 else Phase.DECODE,
            step, layer, tuple(experts), 7,
        )
        for step, token in enumerate(tokens)
        for layer, experts in enumerate(token)
    ]  # fmt: skip
    assert rows == expected


@given(st.lists(st.integers(-3, LAYERS * EXPERTS + 3)))
def test_whatever_a_session_touches_each_access_is_in_one_row(entries: list[int]) -> None:
    rows = record((1, entries))
    listed = [entry(row.layer, expert) for row in rows for expert in row.experts]
    assert listed == [number for number in entries if 0 <= number < LAYERS * EXPERTS]
    assert all(len(set(row.experts)) == len(row.experts) for row in rows)


def test_sessions_are_told_apart() -> None:
    rows = record((1, [0, 1]), (2, [0]), (1, [6]), (2, [5, 6]))
    assert [(row.session, row.layer, row.experts) for row in rows] == [
        (1, 0, (0, 1)), (1, 1, (0,)), (2, 0, (0, 5)), (2, 1, (0,)),
    ]  # fmt: skip


def test_a_prompt_in_waves_is_one_row_and_one_in_blocks_is_several() -> None:
    assert [row.experts for row in record((1, [0, 1, 2, 3]), (1, [4, 5, 6]))] == [
        (0, 1, 2, 3, 4, 5), (0,),
    ]  # fmt: skip
    blocks = record((1, [0, 1, 2, 3]), (1, [1, 2, 6]))
    assert [(row.phase, row.step, row.experts) for row in blocks] == [
        (Phase.PREFILL, 0, (0, 1, 2, 3)), (Phase.PREFILL, 0, (1, 2)), (Phase.PREFILL, 0, (0,)),
    ]  # fmt: skip


def test_after_a_gap_a_new_step_begins() -> None:
    rows: list[Row] = []
    recorder = TraceRecorder(MODEL, rows.append)
    recorder.take(1, [0, 1])
    recorder.end(1)
    recorder.take(1, [6, 7])
    recorder.finish()
    assert [(row.step, row.layer) for row in rows] == [(0, 0), (1, 1)]


def test_of_one_layer_rows_are_a_tokens() -> None:
    rows = record((1, [0, 1, 2, 3, 2]), model=TraceModel((6,), (2,), (0,)))
    assert [(row.step, row.experts) for row in rows] == [(0, (0, 1)), (1, (2, 3)), (2, (2,))]


def test_a_layer_without_end_takes_no_memory() -> None:
    rows: list[Row] = []
    recorder = TraceRecorder(MODEL, rows.append)
    recorder.take(1, [1, 1] * 1000)
    assert len(rows) > 1900

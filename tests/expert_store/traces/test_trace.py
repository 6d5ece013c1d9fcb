"""Trace files: what is written is read back, and what is wrong is told with its line."""

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstore.errors import TraceError
from expertstore.trace import (
    HEADER,
    MAX_LINE_BYTES,
    WEIGHTED_HEADER,
    Phase,
    Row,
    TraceModel,
    TraceReader,
    TraceWriter,
)

MODEL = TraceModel((4, 6), (2, 3), (1, 3), {"model": "tiny"})
HEAD = f"# layers: 2\n# experts_per_layer: 4\n# experts_per_token: 2\n{HEADER}\n"
WEIGHTED = HEAD.replace(HEADER, WEIGHTED_HEADER)

rows = st.builds(
    Row,
    st.sampled_from(Phase),
    st.integers(0, 2**40),
    st.integers(0, 1),
    st.lists(st.integers(0, 3), min_size=1, unique=True).map(tuple),
    st.integers(0, 3),
    st.just(()),
)


@given(st.lists(rows), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, written: list, weighted: bool
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    model = replace(MODEL, weighted=weighted)
    if weighted:
        written = [row._replace(weights=tuple(0.5 * x for x in row.experts)) for row in written]
    with TraceWriter(path, model) as writer:
        for row in written:
            writer.write(row)
        writer.write_gap(2, 70)
        writer.commit()
    with TraceReader(path) as reader:
        assert reader.model == model
        assert list(reader) == written
        assert reader.num_lost == 70


def test_other_columns_of_comments_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"# made: by hand\n\n{HEAD}\n# note\nprefill,0,1,3 0\r\n\ndecode,1,0,2")
    with TraceReader(path) as reader:
        assert reader.model.num_experts == (4, 4)
        assert list(reader) == [Row(Phase.PREFILL, 0, 1, (3, 0)), Row(Phase.DECODE, 1, 0, (2,))]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "ends before its header"),
        ("# layers: 2\n", 2, "ends before its header"),
        ("decode,0,0,1\n", 1, "must be the header"),
        (HEADER + "\n", 1, "'# layers: N' must stand above"),
        (HEAD.replace("# layers: 2", "# layers: 0"), 4, "must be 1 to"),
        (HEAD.replace("# layers: 2", "# layers: many"), 4, "no number"),
        (HEAD.replace("layer: 4", "layer: 4 4 4"), 4, "3 numbers for 2 layers"),
        (HEAD.replace("token: 2", "token: 5"), 4, "more than experts_per_layer"),
        ("# layer_ids: 2 1\n" + HEAD, 5, "does not rise"),
        (HEAD + "decode,0,0\n", 5, "4 fields"),
        (HEAD + "training,0,0,1\n", 5, "prefill or decode"),
        (HEAD + "decode,x,0,1\n", 5, "the step is 'x'"),
        (HEAD + "decode,-1,0,1\n", 5, "no number"),
        (HEAD + "decode,0,2,1\n", 5, "no layer 2"),
        (HEAD + "decode,0,0,1\ndecode,0,1,4\n", 6, "must be 0 to 3"),
        (HEAD + "decode,0,0,1 1\n", 5, "stands twice"),
        (HEAD + "decode,0,0,\n", 5, "names no expert"),
        (HEAD + "decode,0,0,1e0\n", 5, "no number"),
        (HEAD + "decode,0,0,٣\n", 5, "no number"),
        (HEAD + "# session: me\n", 5, "the session is 'me'"),
        (WEIGHTED + "decode,0,0,1\n", 5, "5 fields"),
        (WEIGHTED + "decode,0,0,1 2,0.5\n", 5, "2 experts and 1 weights"),
        (WEIGHTED + "decode,0,0,1,nan\n", 5, "a weight is 'nan'"),
        (WEIGHTED + "decode,0,0,1,-1\n", 5, "a weight is '-1'"),
        (HEAD + "decode,0,0," + "1 " * MAX_LINE_BYTES, 5, "longer than"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, text: str, line: int, problem: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as caught, TraceReader(path) as reader:
        list(reader)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert problem in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300


def test_what_is_no_text_or_no_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(TraceError, match="cannot be read"):
        TraceReader(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(TraceError, match="line 1: the line is not text"):
        TraceReader(path)
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        TraceReader(tmp_path)


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match="longer than"):
            TraceReader(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


def test_without_commit_nothing_is_there(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("the last one")
    with TraceWriter(path, MODEL) as writer:
        writer.write(Row(Phase.DECODE, 0, 0, (1,)))
        assert path.read_text() == "the last one"
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]
    assert path.read_text() == "the last one"


def test_a_trace_is_its_owners_alone(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.csv", MODEL) as writer:
        writer.commit()
    assert (tmp_path / "t.csv").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """Here full at 64 KiB, by a limit on the size of files."""
    program = f"""
import resource, signal
from pathlib import Path
from expertstore.errors import TraceError
from expertstore.trace import Phase, Row, TraceModel, TraceWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with TraceWriter(Path({str(tmp_path / "t.csv")!r}), TraceModel((4,), (2,), (0,))) as writer:
        for step in range(100000):
            writer.write(Row(Phase.DECODE, step, 0, (1, 2)))
        writer.commit()
except TraceError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == f"{tmp_path / 't.csv'} cannot be written: File too large.\n", run.stderr
    assert not run.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written: No such file or directory"):
        TraceWriter(tmp_path / "no" / "t.csv", MODEL)

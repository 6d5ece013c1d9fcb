"""Files of answers, cut where a kill may cut them."""

import resource
from pathlib import Path

import pytest

from expertd_inference.server.batches.batch_output import (
    BatchOutput,
    LineError,
    LineResponse,
    new_line,
)
from expertstore.errors import InvalidInputError, PreconditionError


def written(path: Path) -> bytes:
    """Three lines, the second of which failed and the third of which was not asked."""
    with BatchOutput(path) as output:
        output.append(new_line("a", LineResponse(200, "r", {"text": "one\ntwo"})))
        output.append(new_line("b", LineResponse(400, "r", {"error": {}})))
        output.append(new_line("é", None, LineError("invalid_line", "It is wrong.")))
        assert output.num_failed == 2
    return path.read_bytes()


def test_a_line_cut_anywhere_is_taken_away_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = written(path)
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3
    answered = [("a", False), ("b", True), ("é", True)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with BatchOutput(path) as output:
            kept = [*output.answered.items()]
            assert output.num_failed == sum(failed for _, failed in kept)
        assert path.read_bytes() == b"".join(lines[: len(kept)])
        assert kept == answered[: whole[:size].count(b"\n")]


@pytest.mark.parametrize("content", ["a text", "a text\n", '{"custom_id": "a"}\n', "\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "precious"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match="precious, line 1: it is no answer of a batch"):
        BatchOutput(path)
    assert path.read_text() == content


def test_a_line_for_which_there_is_no_room_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = written(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BatchOutput(path) as output:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
            with pytest.raises(PreconditionError, match="File too large; start again once it can"):
                output.append(new_line("d", LineResponse(200, "r", {})))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == whole
        # That of another request, which was answered meanwhile.
        output.append(new_line("e", LineResponse(200, "r", {})))
    with BatchOutput(path) as output:
        assert [*output.answered] == ["a", "b", "é", "e"]


def test_files_for_which_there_is_no_room_are_none(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path)
    files = [tmp_path / name for name in ("good", "bad")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BatchOutput(path) as output:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
            with pytest.raises(OSError, match="File too large"):
                output.split(*files)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not any(file.exists() for file in files)
        output.split(*files)
        assert [len(file.read_bytes().splitlines()) for file in files] == [1, 2]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        BatchOutput(path),
        pytest.raises(PreconditionError, match="is being written by another run"),
    ):
        BatchOutput(path)
    BatchOutput(path).close()


def test_places_that_take_no_lines(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot be written: Is a directory"):
        BatchOutput(tmp_path)
    with pytest.raises(InvalidInputError, match="is no file whose lines can be read again"):
        BatchOutput(Path("/dev/null"))


def test_answers_and_errors_apart(tmp_path: Path) -> None:
    lines = written(tmp_path / "out.jsonl").splitlines(keepends=True)
    with BatchOutput(tmp_path / "out.jsonl") as output:
        output.split(tmp_path / "good", tmp_path / "bad")
    assert (tmp_path / "good").read_bytes() == lines[0]
    assert (tmp_path / "bad").read_bytes() == lines[1] + lines[2]

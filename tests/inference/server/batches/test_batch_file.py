"""Files of requests: what is refused as a whole, and what becomes one line's error."""

from pathlib import Path
from typing import Any

import pytest

from expertd_inference.server.batches.batch_file import BatchFile
from expertstore.errors import InvalidInputError
from tests.inference.server.batches.lines import request, write_lines


def test_requests_are_read_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [request("a", seed=1), "", request("é" * 20, seed=2), "  ", request("c", seed=3)]
    path.write_bytes(
        b"\xef\xbb\xbf" + write_lines(path, lines).read_bytes().replace(b"\n", b"\r\n")
    )
    with BatchFile(path) as file:
        assert file.custom_ids == ["a", "é" * 20, "c"]
        assert [file.request(one).body["seed"] for one in reversed(file.custom_ids)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "has no request; give one JSON object a line"),
        ([""], "has no request"),
        ([request("a"), "{"], "line 2: it is no JSON"),
        (["[1]"], "line 1: Expected `object`, got `array`"),
        ([{"method": "POST"}], "line 1: Object missing required field `custom_id`"),
        ([request("a"), '{"custom_id": "b", "body": ' + "[" * 100_000], "line 2: it is nested"),
        ([request("")], "line 1: custom_id has 0 characters; give 1 to 512"),
        ([request("a"), "", request("a")], "line 3: custom_id 'a' is line 1's already"),
    ],
)
def test_a_file_that_cannot_be_answered_is_refused(
    tmp_path: Path, lines: list[Any], why: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        BatchFile(write_lines(tmp_path / "in.jsonl", lines))
    assert why in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'in.jsonl'}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: No such file"):
        BatchFile(tmp_path / "none")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"custom_id": "b"}, "Object missing required field `method`"),
        (request("b") | {"body": "text"}, r"Expected `object`, got `str` - at `\$.body`"),
        (request("b") | {"method": "GET"}, "method is 'GET'; give POST"),
        (request("b", url="/v1/embeddings"), "url is '/v1/embeddings'; give /v1/chat/completions"),
        (request("b", stream=True), "body.stream is set"),
    ],
)
def test_a_line_that_cannot_be_asked(tmp_path: Path, line: dict[str, Any], why: str) -> None:
    with BatchFile(write_lines(tmp_path / "in.jsonl", [request("a"), line]), "it") as file:
        assert file.request("a").custom_id == "a"
        with pytest.raises(InvalidInputError, match=f"it, line 2: {why}"):
            file.request("b")

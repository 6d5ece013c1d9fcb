"""Asking the requests of a batch: how many at a time, again, and no longer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from expertd_inference.server.batches import batch_run
from expertd_inference.server.batches.batch_file import BatchFile, BatchRequest
from expertd_inference.server.batches.batch_output import BatchOutput
from expertd_inference.server.batches.batch_run import Reply, _message, check_resumed, run_batch
from expertstore.errors import InvalidInputError, UnavailableError
from tests.inference.server.batches.lines import answers_of, request, write_lines

Ask = Callable[[BatchRequest], Awaitable[Reply]]
Run = Callable[..., Awaitable[dict[str, dict[str, Any]]]]
BUSY = Reply(429, "", b'{"error": {"message": "It is full."}}', 0.001)
AWAY = Reply(503, "", b'{"error": {"message": "It loads."}}', 0.001)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_run, "_RETRY_SECONDS", 0.001)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Asks for lines, or goes on with them; what was written."""

    async def run(ask: Ask, lines: Iterable[Any] = "abcdef", **more: Any) -> dict[str, Any]:
        requests = [request(line) if isinstance(line, str) else line for line in lines]
        out = tmp_path / "out.jsonl"
        with (
            BatchFile(write_lines(tmp_path / "in.jsonl", requests)) as file,
            BatchOutput(out) as output,
        ):
            check_resumed(file, output, "out.jsonl")
            await run_batch(file, output, ask, **{"at_once": 2} | more)
        return answers_of(out.read_text())

    return run


def replying(*replies: Reply | Exception) -> tuple[Ask, list[BatchRequest]]:
    """Asks that get these replies in turn, the last one again and again; and what was asked."""
    asked: list[BatchRequest] = []

    async def ask(request: BatchRequest) -> Reply:
        reply = replies[min(len(asked), len(replies) - 1)]
        asked.append(request)
        await asyncio.sleep(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return ask, asked


OK = Reply(200, "id", b'{"choices": [],\n "usage": {}}')


async def test_so_many_at_a_time(run: Run) -> None:
    running, most = 0, 0

    async def ask(_: BatchRequest) -> Reply:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.001)
        running -= 1
        return OK

    found = await run(ask, at_once=3)
    assert most == 3
    assert sorted(found) == [*"abcdef"]
    body = {"choices": [], "usage": {}}
    assert found["a"]["response"] == {"status_code": 200, "request_id": "id", "body": body}
    assert found["a"]["error"] is None
    assert found["a"]["id"].startswith("batch_req_")


async def test_batches_go_behind_others(run: Run) -> None:
    ask, asked = replying(OK)
    chat, responses = "/v1/chat/completions", "/v1/responses"
    lines = [request("a"), request("b", priority=5), request("c", chat, priority=-7)]
    await run(ask, [*lines, request("d", responses), request("e", priority="x")], at_once=1)
    assert [one.body.get("priority") for one in asked] == [1000, 1005, 1000, None, "x"]


async def test_what_is_answered_is_not_asked_again(run: Run) -> None:
    ask, asked = replying(OK, Reply(400, "", b"no JSON"), OK, UnavailableError("It is gone."))
    with pytest.raises(UnavailableError, match="It is gone"):
        await run(ask, at_once=1, patience=0)
    assert [one.custom_id for one in asked] == [*"abcd"]
    ask, asked = replying(OK)
    found = await run(ask)
    assert sorted(one.custom_id for one in asked) == [*"def"]
    assert sorted(found) == [*"abcdef"]
    assert found["b"]["response"] == {"status_code": 400, "request_id": "", "body": "no JSON"}
    ask, asked = replying(OK)
    await run(ask)
    assert not asked


async def test_a_wrong_line_is_answered_without_asking(run: Run) -> None:
    ask, asked = replying(OK)
    found = await run(ask, ["a", request("b", stream=True)])
    assert [one.custom_id for one in asked] == ["a"]
    assert found["b"]["response"] is None
    assert found["b"]["error"]["code"] == "invalid_line"
    assert "line 2: body.stream is set" in found["b"]["error"]["message"]


@pytest.mark.parametrize("reply", [BUSY, AWAY, UnavailableError("It is gone.")], ids=str)
async def test_a_server_that_cannot_answer_yet_is_asked_again(
    run: Run, reply: Reply | Exception
) -> None:
    ask, asked = replying(reply, reply, OK)
    found = await run(ask, "a")
    assert len(asked) == 3
    assert found["a"]["response"]["status_code"] == 200


async def test_patience_ends_for_one_that_is_away_and_not_for_a_busy_one(run: Run) -> None:
    ask, _ = replying(AWAY)
    with pytest.raises(UnavailableError, match="The server is away: It loads"):
        await run(ask, patience=0.01)
    ask, asked = replying(*[BUSY] * 100, OK)
    await run(ask, patience=0)
    assert len(asked) == 100 + len("abcdef")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_server_that_does_not_know_the_key_ends_it(run: Run, status: int) -> None:
    ask, asked = replying(Reply(status, "", b'{"error": {"message": "Who are you?"}}'))
    with pytest.raises(InvalidInputError, match="refuses the batch: Who are you"):
        await run(ask, at_once=1)
    assert len(asked) == 1


async def test_answers_to_another_file_are_not_mixed_with_these(run: Run) -> None:
    ask, _ = replying(OK)
    await run(ask, "ab")
    with pytest.raises(InvalidInputError, match=r"out.jsonl has answers to another batch.*'b'"):
        await run(ask, "ac")


async def test_the_end_cancels_what_is_asked(run: Run) -> None:
    cancelled = 0

    async def ask(request: BatchRequest) -> Reply:
        nonlocal cancelled
        if request.custom_id == "b":
            raise InvalidInputError("The server refuses the batch.")
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            cancelled += 1
            raise

    with pytest.raises(InvalidInputError):
        await run(ask, at_once=3)
    assert cancelled == 2


def test_what_a_server_says_of_a_failure() -> None:
    for body, said in (
        (b'{"error": {"message": "No."}}', "No."),
        (b'{"error": "No."}', '{"error": "No."}'),
        (b"<html>\xff" + b"x" * 500, "<html>\ufffd" + "x" * 193),
        (b" ", "it does not say why."),
    ):
        assert _message(body) == said

"""Asks the requests of a batch, a bounded number at a time, and writes their answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from expertd_inference.server.batches.batch_file import BatchFile, BatchRequest
from expertd_inference.server.batches.batch_output import (
    AnswerLine,
    BatchOutput,
    LineError,
    LineResponse,
    new_line,
)
from expertstore.errors import InvalidInputError, UnavailableError

PRIORITY = 1000
"""Of a batch's requests, as vLLM's field has it: the larger number goes later."""
PATIENCE_SECONDS = 60.0
"""For how long a server may be away."""
_RETRY_SECONDS = 1.0
_AWAY = (502, 503, 504)
_BUSY = 429
_REFUSED = (401, 403)
_PRIORITISED = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Reply:
    """What a server answered; ``retry_seconds`` is when it wants to be asked again."""

    status: int
    request_id: str
    body: bytes
    retry_seconds: float | None = None


Ask = Callable[[BatchRequest], Awaitable[Reply]]
"""Asks a server. Raises UnavailableError if it is away."""


async def run_batch(
    file: BatchFile,
    output: BatchOutput,
    ask: Ask,
    *,
    at_once: int,
    done: Callable[[AnswerLine], None] = lambda _: None,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Asks what ``output`` has no answer to, and calls ``done`` with each line that it wrote.

    A server that is busy is asked again; one that is away, for ``patience`` seconds. Raises
    UnavailableError after that, InvalidInputError if the server answers nobody without a key, and
    what ``output`` raises; then what was written stays, and the rest is asked the next time.
    """
    left = iter([one for one in file.custom_ids if one not in output.answered])

    async def one_after_the_other(left: Iterator[str]) -> None:
        for custom_id in left:
            line = await _answer(file, custom_id, ask, patience)
            output.append(line)
            done(line)

    tasks = [asyncio.create_task(one_after_the_other(left)) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_resumed(file: BatchFile, output: BatchOutput, name: str) -> None:
    """Raises InvalidInputError if ``output``, called ``name``, answers another file."""
    others = output.answered.keys() - set(file.custom_ids)
    if others:
        raise InvalidInputError(
            f"{name} has answers to another batch, such as {min(others)!r:.80}; name another file "
            "for the answers."
        )


async def _answer(file: BatchFile, custom_id: str, ask: Ask, patience: float) -> AnswerLine:
    try:
        request = file.request(custom_id)
    except InvalidInputError as error:
        return new_line(custom_id, None, LineError("invalid_line", str(error)))
    reply = await _ask_until_answered(ask, _behind_others(request), patience)
    try:
        body: Any = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = reply.body.decode(errors="replace")
    return new_line(custom_id, LineResponse(reply.status, reply.request_id, body))


async def _ask_until_answered(ask: Ask, request: BatchRequest, patience: float) -> Reply:
    away_since: float | None = None
    while True:
        wait = _RETRY_SECONDS
        try:
            reply = await ask(request)
        except UnavailableError as error:
            why = error
        else:
            wait = reply.retry_seconds or wait
            if reply.status in _REFUSED:
                raise InvalidInputError(f"The server refuses the batch: {_message(reply.body)}")
            if reply.status == _BUSY:
                away_since = None
                await asyncio.sleep(wait)
                continue
            if reply.status not in _AWAY:
                return reply
            why = UnavailableError(f"The server is away: {_message(reply.body)}")
        away_since = away_since or time.monotonic()
        if time.monotonic() - away_since >= patience:
            raise why
        await asyncio.sleep(wait)


def _behind_others(request: BatchRequest) -> BatchRequest:
    """The request, to be computed after those of people who wait."""
    if request.url not in _PRIORITISED:
        return request
    given = request.body.get("priority", 0)
    if not isinstance(given, int):  # The server says what is wrong with it.
        return request
    return msgspec.structs.replace(
        request, body={**request.body, "priority": PRIORITY + max(0, given)}
    )


def _message(body: bytes) -> str:
    """The sentence in an error of OpenAI's form."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        return body[:200].decode(errors="replace").strip() or "it does not say why."

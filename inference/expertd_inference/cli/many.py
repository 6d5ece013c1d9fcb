"""Continues many prompts at once, and writes a line of JSON for each."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from expertd_inference.cli.prompt_file import PromptLine
from expertd_inference.cli.text_output import TextOutput, progress
from expertd_inference.engine.engine import Engine
from expertd_inference.engine.stats import EngineStats
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Likely, Token
from expertstore.errors import (
    DeviceError,
    ExpertdError,
    IncarnationError,
    NotFoundError,
    PreconditionError,
    SessionLostError,
    UnavailableError,
)
from expertstore.interrupts import between_callbacks

_ENDS_ALL = (DeviceError, IncarnationError, NotFoundError, SessionLostError, UnavailableError)
"""Errors that the other prompts would meet as well."""


class PromptResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one line.

    ``line`` is its number in the file, from 1 on. ``tokens`` are the new ids, with the end-of-text
    token if it came; ``logprobs`` and ``top_logprobs``, one for each, are there if its settings
    ask for them. ``finish_reason`` is ``stop`` or ``length``. ``seconds`` runs from when it was
    submitted, with the time that it waited for its turn. ``error`` says in a sentence why a line
    failed; then ``text`` and ``tokens`` are what there was until then.
    """

    line: int
    text: str
    tokens: list[int]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: str | None = None
    logprobs: list[float | None] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    prompt_logprobs: tuple[Likely, ...] | None = None
    error: str | None = None


class Totals(msgspec.Struct, kw_only=True):
    """What all lines took together, in ``seconds``; the last line of output with ``--json``.

    ``num_prompts`` were done, ``num_failed`` of them with an error. ``engine`` is what it did.
    """

    num_prompts: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    engine: EngineStats | None = None

    def end(self, seconds: float, engine: EngineStats) -> None:
        """No more lines."""
        self.seconds, self.engine = seconds, engine
        self.tokens_per_second = self.new_tokens / seconds

    def count(self, result: PromptResult) -> None:
        """One more line is done."""
        self.num_prompts += 1
        self.num_failed += result.error is not None
        self.prompt_tokens += result.prompt_tokens
        self.new_tokens += result.new_tokens


def continue_many(
    engine: Engine, lines: Sequence[PromptLine], output: TextOutput, *, json: bool
) -> bool:
    """Writes a line for each prompt, with ``json`` one of totals, too; whether it was interrupted.

    Raises PreconditionError if some failed.
    """
    totals = Totals()
    began = time.perf_counter()
    interrupted = False

    with progress(len(lines)) as advance:

        def done(result: PromptResult) -> None:
            totals.count(result)
            output.end(msgspec.json.encode(result))
            advance(f"{totals.new_tokens / (time.perf_counter() - began):.1f} tokens/s")

        try:
            continue_all(engine, lines, done)
        except KeyboardInterrupt:
            interrupted = True
    totals.end(time.perf_counter() - began, engine.stats)
    if json:
        output.end(msgspec.json.encode(totals))
    if totals.num_failed:
        raise PreconditionError(
            f"{totals.num_failed} of {len(lines)} prompts failed; their lines say why (error)."
        )
    return interrupted


def continue_all(
    engine: Engine,
    lines: Sequence[PromptLine],
    done: Callable[[PromptResult], None],
) -> None:
    """Calls ``done`` with each line's result as it comes.

    A line that fails does not end the others. Raises what would end them all: a daemon that is
    gone, a model that was unloaded, a device that failed.
    """
    # Twice as many as are computed together: the next is ready when one is complete.
    at_once = min(len(lines), 2 * engine.limits.max_sequences, engine.limits.max_waiting)
    asyncio.run(_continue_all(engine, iter(lines), at_once, done))


async def _continue_all(
    engine: Engine,
    lines: Iterator[PromptLine],
    at_once: int,
    done: Callable[[PromptResult], None],
) -> None:
    async def one_after_the_other() -> None:
        for line in lines:
            done(await _continue(engine, line))

    with between_callbacks(asyncio.get_running_loop()):
        tasks = [asyncio.create_task(one_after_the_other()) for _ in range(at_once)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _continue(engine: Engine, line: PromptLine) -> PromptResult:
    began = time.perf_counter()
    tokens: list[Token] = []
    stream: TokenStream | None = None
    error = None
    try:
        async with engine.submit(line.prompt, line.settings) as stream:
            async for token in stream:
                tokens.append(token)  # noqa: PERF401 - what came before an error counts
    except _ENDS_ALL:
        raise
    except ExpertdError as failed:
        error = str(failed)
    asked = line.settings.logprobs is not None
    return PromptResult(
        line=line.number,
        text="".join(token.text for token in tokens),
        tokens=[token.id for token in tokens],
        prompt_tokens=0 if stream is None else stream.num_prompt_tokens,
        new_tokens=len(tokens),
        seconds=time.perf_counter() - began,
        finish_reason=None if stream is None else stream.finish_reason,
        logprobs=[token.logprob for token in tokens] if asked else None,
        top_logprobs=[token.top_logprobs for token in tokens] if asked else None,
        prompt_logprobs=None if stream is None else stream.prompt_logprobs,
        error=error,
    )

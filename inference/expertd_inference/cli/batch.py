"""``expert-run batch``: answers a file of requests, and goes on where it was ended."""

import asyncio
import signal
import sys
import time
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from expertd_inference.cli import options
from expertd_inference.cli.text_output import TextOutput, complain, progress, status
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.process.environment import prepare_front
from expertd_inference.settings import Activations, DeviceSettings, KernelsName
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.interrupts import between_callbacks, exit_code, interruptible

if TYPE_CHECKING:
    from expertd_inference.server.batches.batch_file import BatchFile
    from expertd_inference.server.batches.batch_output import AnswerLine, BatchOutput
    from expertd_inference.server.batches.batch_run import Ask

_LIMITS = EngineLimits()
DEFAULT_AT_ONCE = 32
"""Requests that another process's server has at a time; half of what it computes together."""


class Totals(msgspec.Struct, kw_only=True):
    """What a run did, in ``seconds``; the output of ``--json``.

    The file has ``num_requests``, ``num_before`` of which were answered by earlier runs and
    ``num_answered`` by this one. ``num_failed`` of all have an error instead.
    """

    num_requests: int
    num_before: int
    num_answered: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0

    def count(self, line: "AnswerLine") -> None:
        """One more line."""
        self.num_answered += 1
        self.num_failed += line.failed
        body = None if line.response is None else line.response.body
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            # The Responses interface has its own names.
            self.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
            self.new_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0

    def end(self, seconds: float) -> None:
        """No more lines."""
        self.seconds = seconds
        self.tokens_per_second = self.new_tokens / seconds


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            help="Requests, a JSON object a line: custom_id, method, url and body.",
            readable=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.jsonl",
            help="Where answers go. What it has already is not asked again.",
            readable=False,
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="Ask the server there, as in http://127.0.0.1:8080.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="With --url: a key of that server.", metavar="KEY", envvar="OPENAI_API_KEY"
        ),
    ] = None,
    socket: options.Socket = None,
    embedded: options.Embedded = None,
    ram: options.Ram = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many requests to have asked at a time. Default: with --url "
            f"{DEFAULT_AT_ONCE}, else twice --max-sequences.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print totals as one JSON object.")] = False,
    chat_template: options.ChatTemplate = None,
    max_sequences: options.MaxSequences = _LIMITS.max_sequences,
    kv_tokens: options.KvTokens = None,
    experts_per_token: options.ExpertsPerToken = None,
    expert_threshold: options.ExpertThreshold = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    kernels: options.Kernels = KernelsName.AUTO,
    exact: options.Exact = False,
    activations: options.ActivationsOption = Activations.BITS_16,
    device: options.Device = options.DEFAULTS.device,
    cache_bytes: options.CacheBytes = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format, a line for each.

    Run it again after it was ended, however it was: it goes on where it stood.

    A line of IN.jsonl, whose answer is the line of OUT.jsonl with the same custom_id:

      {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}

    [bold]Examples[/bold]

      expert-run batch in.jsonl out.jsonl --embedded ./mixtral-pack

      expert-run batch in.jsonl out.jsonl --url http://127.0.0.1:8080
    """
    prepare_front()
    with options.extra_serve("batch"):
        from expertd_inference.server.batches.batch_file import BatchFile
        from expertd_inference.server.batches.batch_output import BatchOutput
        from expertd_inference.server.batches.batch_run import check_resumed
        from expertd_inference.server.batches.own_server import own_door
        from expertd_inference.server.batches.url_door import UrlDoor
        from expertd_inference.server.hosting.engine_child import EngineSpec
    options.check_places(ram, url=url, socket=socket, embedded=embedded)
    if url is not None and (experts_per_token, expert_threshold) != (None, None):
        raise InvalidInputError(
            "--experts-per-token and --expert-threshold are for models that this command computes; "
            "with --url, put experts_per_token and expert_threshold in the bodies of requests."
        )
    output = TextOutput(json=json, stream=False)
    limits = EngineLimits(
        max_sequences=max_sequences,
        kv_tokens=kv_tokens,
        experts_per_token=experts_per_token,
        expert_threshold=expert_threshold,
    )
    with interruptible(), ExitStack() as stack:
        file = stack.enter_context(BatchFile(source))
        answers = stack.enter_context(BatchOutput(target))
        check_resumed(file, answers, str(target))
        totals = Totals(num_requests=len(file), num_before=len(answers.answered))
        totals.num_failed = answers.num_failed
        interrupted = False
        began = time.perf_counter()
        if totals.num_before < totals.num_requests:
            door: AbstractAsyncContextManager[Ask]
            if url is not None:
                door, most = nullcontext(UrlDoor(url, api_key)), DEFAULT_AT_ONCE
            else:
                if embedded is not None:
                    with status("Starting a daemon"):
                        daemon = stack.enter_context(EmbeddedDaemon(embedded, ram=ram))
                    socket = str(daemon.socket)
                spec = EngineSpec(
                    model="",
                    socket=socket,
                    device=DeviceSettings(device, options.size_of("--cache-bytes", cache_bytes)),
                    dtype=dtype,
                    kernels=kernels,
                    exact=exact,
                    activations=int(activations),
                    threads=threads,
                    limits=limits,
                )
                door, most = own_door(spec, chat_template, complain), 2 * max_sequences
            try:
                asyncio.run(_run(file, answers, door, at_once or most, totals))
            except KeyboardInterrupt:
                interrupted = True
        totals.end(time.perf_counter() - began)
    if json:
        output.end(msgspec.json.encode(totals))
    elif totals.num_answered:
        complain(
            f"{totals.num_answered} of {totals.num_requests} requests answered, "
            f"{totals.tokens_per_second:.1f} tokens/s"
        )
    if interrupted:
        sys.exit(exit_code(signal.SIGINT))
    if totals.num_failed:
        raise PreconditionError(
            f"{totals.num_failed} of {totals.num_requests} requests failed; their lines in "
            f"{target} say why."
        )


async def _run(
    file: "BatchFile",
    answers: "BatchOutput",
    opening: "AbstractAsyncContextManager[Ask]",
    at_once: int,
    totals: Totals,
) -> None:
    from expertd_inference.server.batches.batch_run import run_batch

    with (
        between_callbacks(asyncio.get_running_loop()),
        progress(totals.num_requests, totals.num_before) as advance,
    ):
        began = time.perf_counter()

        def done(line: "AnswerLine") -> None:
            totals.count(line)
            advance(f"{totals.new_tokens / (time.perf_counter() - began):.1f} tokens/s")

        async with opening as ask:
            await run_batch(file, answers, ask, at_once=at_once, done=done)

"""Clients of a server, as many at once as are asked for, and when each of their tokens came."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_EVENT = b"data: "
_DONE = b"data: [DONE]"
PERCENTILES = (50, 95, 99)


class LoadError(Exception):
    """A server that did not answer as it was to, in one sentence."""


@dataclass
class Stream:
    """One request: when it was asked, and when its tokens came; seconds of one clock."""

    asked: float
    came: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.came[0] - self.asked

    @property
    def between(self) -> list[float]:
        """Seconds between its tokens."""
        return [later - earlier for earlier, later in zip(self.came, self.came[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """What became of several requests that were asked at once."""

    streams: Sequence[Stream]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all, from the first request to the last token."""
        last = max(stream.came[-1] for stream in self.streams)
        began = min(stream.asked for stream in self.streams)
        return sum(len(stream.came) for stream in self.streams) / (last - began)

    def first(self, percent: int) -> float:
        """Of the seconds to the first token."""
        return percentile([stream.first for stream in self.streams], percent)

    def between(self, percent: int) -> float:
        """Of the seconds between tokens."""
        return percentile([one for stream in self.streams for one in stream.between], percent)


class LoadClient:
    """Asks the server at ``url``; prompts are random token ids below ``vocabulary``."""

    def __init__(self, url: str, vocabulary: int, model: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port
        self._vocabulary = vocabulary
        self.model = model
        self._chance = random.Random(14)

    def prompt(self, num_tokens: int) -> list[int]:
        """One that was not asked before."""
        return [self._chance.randrange(10, self._vocabulary) for _ in range(num_tokens)]

    def load(self, clients: int, prompt_tokens: int, new_tokens: int) -> Load:
        """So many clients that ask at once."""

        async def all_of_them() -> list[Stream]:
            prompts = [self.prompt(prompt_tokens) for _ in range(clients)]
            return await asyncio.gather(*(self.ask(prompt, new_tokens) for prompt in prompts))

        return Load(asyncio.run(all_of_them()))

    def first(self, prompt: Sequence[int]) -> float:
        """Seconds to the first token of one client's request."""
        return asyncio.run(self.ask(prompt, 1)).first

    def step_seconds(
        self,
        clients: int,
        prompt_tokens: int,
        steps: int,
        wishes: Callable[[int], Mapping[str, Any]] = lambda _: {},
    ) -> float:
        """Seconds of a step in which all clients' sequences decode.

        ``wishes`` are further fields of the request of the client with that number.
        """

        async def measure() -> float:
            # None ends before the last one has decoded its steps beside all others.
            most = steps + prompt_tokens * clients
            prompts = [self.prompt(prompt_tokens) for _ in range(clients)]
            streams = [Stream(time.perf_counter()) for _ in prompts]
            tasks = [
                asyncio.create_task(self.ask(prompt, most, stream, wishes(number)))
                for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True))
            ]
            await _until(lambda: all(stream.came for stream in streams), tasks)
            last = max(streams, key=lambda stream: stream.came[0])
            await _until(lambda: len(last.came) > steps, tasks)
            await _cancelled(tasks)
            return (last.came[steps] - last.came[0]) / steps

        return asyncio.run(measure())

    def steps_to_a_place(self, places: int, new_tokens: int) -> float:
        """Steps from when one of ``places`` clients leaves to the first token of one that waits."""

        async def measure() -> float:
            streams = [Stream(time.perf_counter()) for _ in range(places)]
            tasks = [
                asyncio.create_task(self.ask(self.prompt(8), new_tokens, stream))
                for stream in streams
            ]
            await _until(lambda: all(len(stream.came) > 2 for stream in streams), tasks)
            waiting = asyncio.create_task(self.ask(self.prompt(8), 1))
            before = len(streams[1].came)
            await _until(lambda: len(streams[1].came) > before + 2, tasks)
            await _cancelled(tasks[:1])
            left = time.perf_counter()
            came = (await waiting).came[0]
            step = statistics.median(streams[1].between)
            await _cancelled(tasks)
            return (came - left) / step

        return asyncio.run(measure())

    async def ask(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        stream: Stream | None = None,
        wishes: Mapping[str, Any] | None = None,
    ) -> Stream:
        """One request; ``stream``, if given, is filled as tokens come. Raises LoadError."""
        body = {"prompt": [*prompt], "max_tokens": new_tokens, "temperature": 0.0}
        body |= {"stream": True, "ignore_eos": True, "cache_prompt": True, **(wishes or {})}
        if self.model is not None:
            body["model"] = self.model
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        stream = stream or Stream(0.0)
        async with _connected(self._host, self._port) as (reader, writer):
            stream.asked = time.perf_counter()
            writer.write(head.encode() + content)
            status = await reader.readline()
            async for line in reader:
                if line.startswith(_DONE):
                    break
                if line.startswith(_EVENT) and len(stream.came) < new_tokens:
                    stream.came.append(time.perf_counter())
            if b" 200 " not in status or len(stream.came) < new_tokens:
                raise LoadError(
                    f"{self._host}:{self._port} gave {len(stream.came)} of {new_tokens} tokens "
                    f"({status.decode(errors='replace').strip()})."
                )
        return stream


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which so many percent lie; the largest of few values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


@asynccontextmanager
async def _connected(
    host: str, port: int | None
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _until(true: Callable[[], bool], tasks: Sequence[asyncio.Task[Stream]]) -> None:
    while not true():
        for task in tasks:
            if task.done():
                task.result()  # raises what went wrong
        await asyncio.sleep(0.0005)


async def _cancelled(tasks: Sequence[asyncio.Task[Stream]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

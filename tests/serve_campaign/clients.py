"""Clients that ask all of the time, and compare what they get."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tests.serve_campaign.asking import AnswerError, Asked, UnloadedError, ask, differences
from tests.serve_campaign.report import Report

SETTLE_SECONDS = 60.0


class Clients:
    """So many that ask one request after the other until they are told to stop."""

    def __init__(self, url: str, requests: Sequence[Asked], report: Report, seed: int) -> None:
        self._url, self._requests, self._report = url, requests, report
        self._chance = random.Random(seed)
        self._expected: list[dict[str, list[Any]]] = []
        self._stopping = False
        self.loaded = asyncio.Event()
        """Cleared while the model is unloaded."""
        self.loaded.set()
        self.came = asyncio.Event()
        """Set by each token of a stream."""
        self.asking = asyncio.Event()
        """Set by each request that begins."""

    async def learn(self) -> None:
        """The answers of a server that nobody disturbs."""
        self._expected = await asyncio.gather(*(ask(self._url, each) for each in self._requests))
        again = await asyncio.gather(*(ask(self._url, each) for each in self._requests))
        self._compare(range(len(again)), again)

    @asynccontextmanager
    async def at_work(self, number: int) -> AsyncIterator[None]:
        """While the block runs; then their last answers are waited for."""
        self._stopping = False
        clients = [asyncio.create_task(self._work()) for _ in range(number)]
        try:
            yield
        finally:
            self._stopping = True
            for done in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(done, BaseException):
                    self._report.problem(f"a client ended: {done!r}")

    async def next(self, event: asyncio.Event) -> None:
        """Waits until ``event`` is set anew."""
        event.clear()
        try:
            await asyncio.wait_for(event.wait(), SETTLE_SECONDS)
        except TimeoutError:
            self._report.problem(f"no client got on for {SETTLE_SECONDS:g} s")

    async def _work(self) -> None:
        while not self._stopping:
            await self.loaded.wait()
            number = self._chance.randrange(len(self._requests))
            self.asking.set()
            try:
                found = await ask(self._url, self._requests[number], self._token)
            except UnloadedError:
                self._report.retried += 1
                await asyncio.sleep(0.2)
            except AnswerError as error:
                self._report.failed += 1
                self._report.problem(str(error))
            else:
                self._report.answers += 1
                self._compare([number], [found])

    def _token(self) -> None:
        self._report.events += 1
        self.came.set()

    def _compare(self, numbers: Sequence[int], found: Sequence[dict[str, list[Any]]]) -> None:
        for number, answer in zip(numbers, found, strict=True):
            parting = [*differences(self._expected[number], answer)]
            if parting:
                self._report.wrong += 1
                self._report.problem(f"{self._requests[number]}: {'; '.join(parting)}")

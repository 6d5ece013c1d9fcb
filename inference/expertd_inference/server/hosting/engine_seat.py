"""The place of one of a model's engines: its process now, and the one after that."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import structs

from expertd_inference.engine.prefix import block_names
from expertd_inference.engine.stats import EngineStats
from expertd_inference.kv.pool import BLOCK_TOKENS
from expertd_inference.server.hosting.asked import Asked
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.engine_choice import (
    EngineLoad,
    KnownPrefixes,
    choose_engine,
)
from expertd_inference.server.hosting.engine_process import EngineProcess
from expertd_inference.server.hosting.messages import Progress, Ready
from expertstore.errors import (
    DeviceLostError,
    ExpertdError,
    IncarnationError,
    NotFoundError,
    PreconditionError,
    SessionLostError,
    StepFailedError,
    UnavailableError,
)

RETRY_SECONDS = 0.5
LOST = {
    *(DeviceLostError, IncarnationError, NotFoundError, PreconditionError),
    *(SessionLostError, StepFailedError, UnavailableError),
}
"""Errors of an engine that the next one may not have: its store or device is gone."""


class SeatOwner(Protocol):
    """The model of some seats; it is told of what happens to their engines."""

    @property
    def num_sequences(self) -> int:
        """Of all its seats."""

    def started(self, seat: "EngineSeat") -> None:
        """It has an engine that has loaded the model."""

    def progressed(self, seat: "EngineSeat", progress: Progress) -> None:
        """Its engine has computed a step."""

    def stands_empty(self, seat: "EngineSeat") -> None:
        """It cannot have an engine now: others may take its sequences."""

    def failed(self, seat: "EngineSeat", error: ExpertdError) -> None:
        """It could not have one for the first time in a row."""

    def lost(self, seat: "EngineSeat") -> None:
        """Its engine computes no more, before it was told so."""

    def died(self, seat: "EngineSeat", fate: str, num_sequences: int) -> None:
        """And that is what became of the process, which had so many sequences."""

    def gave_up(self, seat: "EngineSeat", error: ExpertdError) -> None:
        """No engine can be had for it."""

    def broke(self, fault: BaseException) -> None:
        """It starts no engine any more, by a mistake of ours."""

    def seconds_to_idle(self) -> float | None:
        """After which to ask again; 0 if engines are to end now, None if they never are."""


class EngineSeat:
    """Keeps an engine while one is wanted, and starts another after one that died.

    ``number`` is its own among its model's, for the user. Sequences that it was given go to each
    engine that it gets, from where the one before has come.
    """

    def __init__(self, number: int, spec: EngineSpec, owner: SeatOwner) -> None:
        self.number = number
        self.spec = spec
        self.sequences: dict[int, Asked] = {}
        """Which it was given and which are not complete, by the numbers that its engine knows."""
        self.held: dict[int, Asked] = {}
        """Those of them that its engine was not given yet."""
        self.num_deaths = 0
        """Engines that ended before they were told to."""
        self.max_tokens: int | None = None
        """The longest sequence that fits; None before an engine has said so."""
        self.prefixes = KnownPrefixes(0)
        self.stats: EngineStats | None = None
        self._stats_before: EngineStats | None = None
        self._owner = owner
        self._engine: EngineProcess | None = None
        self._wanted = asyncio.Event()
        self._failing_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._task = self._loop.create_task(self._keep_engine())
        self._task.add_done_callback(self._look_at_end)

    def __repr__(self) -> str:
        state = "no engine" if self._engine is None else f"engine {self._engine.pid}"
        return f"<EngineSeat {self.number}: {state}, {len(self.sequences)} sequences>"

    @property
    def is_up(self) -> bool:
        """Whether its engine has loaded the model."""
        return self._engine is not None

    @property
    def is_starting(self) -> bool:
        """Whether it tries to have one."""
        return self._engine is None and self._wanted.is_set()

    @property
    def pid(self) -> int | None:
        """Of its engine, None if there is none."""
        return None if self._engine is None else self._engine.pid

    @property
    def load(self) -> EngineLoad:
        """How much it has to do."""
        return EngineLoad(
            len(self.sequences), self.spec.limits.max_sequences, num_kept=len(self.prefixes)
        )

    @property
    def total_stats(self) -> EngineStats | None:
        """What its engine said last, with what earlier ones did; None if there never was one."""
        return None if self.stats is None else self.stats.after(self._stats_before)

    def want(self) -> None:
        """Starts an engine if there is none."""
        self._wanted.set()

    async def ready(self) -> Ready:
        """Waits for its engine. Raises what loading raises."""
        self.want()
        return await asyncio.shield(self._ready)

    def give(self, asked: Asked) -> None:
        """Its engine computes this sequence; the next one if it has none now."""
        self.sequences[asked.begin.id] = self.held[asked.begin.id] = asked
        self.give_out()

    def give_out(self) -> None:
        """Gives the engine what it has not; a suspect alone, until that has a token."""
        if self._engine is None or not self.held:
            return
        given = (asked for id_, asked in self.sequences.items() if id_ not in self.held)
        if any(asked.is_suspect for asked in given):
            return
        suspects = [asked for asked in self.held.values() if asked.is_suspect]
        suspects.sort(key=lambda asked: asked.num_deaths)
        for asked in suspects[:1] or [*self.held.values()]:
            del self.held[asked.begin.id]
            self._engine.send(asked.again())

    def take(self, asked: Asked) -> None:
        """A sequence that was given is not its own any more."""
        del self.sequences[asked.begin.id]
        self.held.pop(asked.begin.id, None)
        self.give_out()

    def send(self, message: msgspec.Struct) -> None:
        """To its engine, if there is one."""
        if self._engine is not None:
            self._engine.send(message)

    def abandon(self) -> None:
        """Has another engine take over."""
        if self._engine is not None:
            self._engine.abandon()

    def refuse(self, error: ExpertdError) -> None:
        """Tells those who wait for an engine."""
        ready, self._ready = self._ready, self._loop.create_future()
        if not ready.done():
            ready.set_exception(error)
        ready.exception()  # Whoever waits gets it; there may be nobody.

    async def close(self) -> None:
        """Ends its engine."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()

    async def _keep_engine(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                engine = await EngineProcess.start(self.spec, self._progress)
            except ExpertdError as error:
                await self._failed_to_start(error)
                continue
            self._engine = engine
            self._failing_since = None
            self.stats = engine.ready.stats
            self.max_tokens = engine.ready.max_tokens
            self.prefixes = KnownPrefixes(engine.ready.stats.kv_tokens // BLOCK_TOKENS)
            if not self._ready.done():
                self._ready.set_result(engine.ready)
            self.held = {**self.sequences}
            self.give_out()
            self._owner.started(self)
            told = await self._until_end(engine)
            self._engine = None
            self._stats_before, self.stats = self.total_stats, _at_rest(engine.ready.stats)
            self._ready = self._loop.create_future()
            self._wanted.clear()
            num_sequences = len(self.sequences)
            if not told:
                self.num_deaths += 1
                self._owner.lost(self)
            await engine.close()
            if not told:
                self._owner.died(self, engine.fate, num_sequences)
            if self._owner.num_sequences:
                self._wanted.set()

    def _look_at_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._owner.broke(fault)

    def _progress(self, progress: Progress) -> None:
        if progress.stats is not None:
            self.stats = progress.stats
        self._owner.progressed(self, progress)
        self.give_out()

    async def _until_end(self, engine: EngineProcess) -> bool:
        """Waits for the engine's end; whether it was idle and told to."""
        while not engine.ended.is_set():
            try:
                await asyncio.wait_for(engine.ended.wait(), self._owner.seconds_to_idle())
            except TimeoutError:
                if self._owner.seconds_to_idle() == 0:
                    return True
        return False

    async def _failed_to_start(self, error: ExpertdError) -> None:
        """Tries again in a moment, or tells those who wait."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._owner.failed(self, error)
        self._owner.stands_empty(self)
        passes = type(error) in LOST
        if passes and now - self._failing_since < self.spec.reattach_seconds:
            await asyncio.sleep(RETRY_SECONDS)
            return
        self._failing_since = None
        self._wanted.clear()
        self.refuse(error)
        self._owner.gave_up(self, error)


def choose_seat(seats: Sequence[EngineSeat], tokens: Sequence[int], salt: str) -> EngineSeat:
    """One of ``seats`` for a sequence of ``tokens``, whose prefix its engine will have then."""
    if len(seats) == 1:
        return seats[0]
    # The last token is computed in any case.
    names = block_names(tokens, salt, (len(tokens) - 1) // BLOCK_TOKENS)
    matched = [seat.prefixes.match(names) for seat in seats]
    chosen = seats[choose_engine([seat.load for seat in seats], matched)]
    chosen.prefixes.remember(names)
    return chosen


def _at_rest(stats: EngineStats) -> EngineStats:
    """Of a model without an engine: nothing runs, and nothing was done since the last."""
    return structs.replace(
        stats,
        num_steps=0,
        num_rows=0,
        experts_mean=0.0,
        num_running=0,
        num_waiting=0,
        prefix_queries=0,
        prefix_hits=0,
        num_preemptions=0,
        kv_used=0.0,
    )

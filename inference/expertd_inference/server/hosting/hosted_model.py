"""A model as the front has it: its engine starts when somebody asks, and may die unnoticed."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from msgspec import structs

from expertd_inference.engine.channel import Channel
from expertd_inference.engine.sequence import ORIGIN, Origin
from expertd_inference.engine.stats import EngineStats
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.server.accounts import Accounts
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.engine_process import EngineProcess
from expertd_inference.server.hosting.messages import Begin, Cancel, Progress, Ready
from expertd_inference.server.metrics import ServerMetrics, Times
from expertd_inference.settings import GenerationSettings
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

SUSPECT_DEATHS = 2
"""A sequence during which so many engines end, without a token between, is next computed alone."""
MAX_DEATHS = 8
"""With so many it is given up."""
RETRY_SECONDS = 0.5
_LOST = {
    *(DeviceLostError, IncarnationError, NotFoundError, PreconditionError),
    *(SessionLostError, StepFailedError, UnavailableError),
}
"""Errors of an engine that the next one may not have: its store or device is gone."""


@dataclass
class _Asked:
    """A sequence that is not complete: all that another engine needs to go on with it."""

    begin: Begin
    channel: Channel[Token]
    times: Times
    generated: list[int] = field(default_factory=list)
    num_deaths: int = 0
    reason: str = "abort"

    @property
    def is_suspect(self) -> bool:
        """Whether engines may have ended because of it."""
        return self.num_deaths >= SUSPECT_DEATHS

    def again(self) -> Begin:
        origin, settings = self.begin.origin, self.begin.settings
        if self.generated:
            origin = replace(origin, generated=tuple(self.generated))
            # The client has them; and without them the prompt may be found as a prefix.
            settings = replace(settings, prompt_logprobs=None)
        return Begin(self.begin.id, self.begin.tokens, settings, origin)


class HostedModel:
    """Sequences of one model, by an engine that starts at the first and ends when idle.

    An engine that ends before its sequences, killed or without its store, costs them a pause:
    another one goes on after the tokens that were delivered. Sequences that may be why engines
    ended are tried one by one, so that no other ends with them. If no engine can be had for
    ``spec.reattach_seconds``, they end with the error. Everything is for one event loop.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        accounts: Accounts,
        metrics: ServerMetrics,
        idle_seconds: float | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.spec = spec
        self.name = spec.model
        self.num_deaths = 0
        """Engines that ended before they were told to."""
        self.num_tokens = 0
        """Generated, of all sequences."""
        self._stats: EngineStats | None = None
        self._stats_before: EngineStats | None = None
        self._accounts = accounts
        self._metrics = metrics
        metrics.models.append(self)
        self._idle_seconds = idle_seconds
        self._say = say
        self._ids = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._held: dict[int, _Asked] = {}
        """Those of them that the engine was not given yet."""
        self._engine: EngineProcess | None = None
        self._wanted = asyncio.Event()
        self._failing_since: float | None = None
        self._max_tokens: int | None = None
        self._last_used = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._closed: ExpertdError | None = None
        """What is told to those who ask, once there will be no engine any more."""
        self._task = self._loop.create_task(self._keep_engine())
        self._task.add_done_callback(self._look_at_end)

    def __repr__(self) -> str:
        state = "no engine" if self._engine is None else f"engine {self._engine.pid}"
        return f"<HostedModel {self.name}: {state}, {len(self._asked)} sequences>"

    @property
    def engine_pid(self) -> int | None:
        """Of its engine, None if there is none."""
        return None if self._engine is None else self._engine.pid

    @property
    def total_stats(self) -> EngineStats | None:
        """What its engine said last, with what earlier ones did; None if there never was one."""
        return None if self._stats is None else self._stats.after(self._stats_before)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that fits; None before an engine has said so."""
        return self._max_tokens

    @property
    def num_sequences(self) -> int:
        """Which are not complete."""
        return len(self._asked)

    async def ready(self) -> Ready:
        """Starts an engine if there is none, and waits for it. Raises what loading raises."""
        self._check_open()
        self._wanted.set()
        self._last_used = time.monotonic()
        return await asyncio.shield(self._ready)

    def submit(
        self, tokens: Sequence[int], settings: GenerationSettings, origin: Origin = ORIGIN
    ) -> TokenStream:
        """As :meth:`Engine.submit` for tokens, but most errors of the request come by the stream.

        Raises BusyError if the origin's user has as many sequences as it may, and once it is
        closed what it was closed with.
        """
        self._check_open()
        if settings.seed is None:
            # The next engine must draw what this one would have.
            settings = replace(settings, seed=secrets.randbits(64))
        self._accounts.begin(origin.user)
        now = time.monotonic()
        self._accounts.take_tokens(origin.user, len(tokens), now)
        self._metrics.began(self.name, len(tokens))
        origin = replace(origin, priority=self._accounts.priority_of(origin.user, origin.priority))
        id_ = next(self._ids)
        channel: Channel[Token] = Channel()
        asked = _Asked(Begin(id_, [*tokens], settings, origin), channel, Times(now))
        self._asked[id_] = self._held[id_] = asked
        self._wanted.set()
        self._give_out()
        return TokenStream(channel, partial(self._cancel_soon, id_), num_prompt_tokens=len(tokens))

    async def close(self, error: ExpertdError | None = None) -> None:
        """Ends its engine; who asks or waits is told ``error``, or that the server is stopping."""
        self._closed = error or PreconditionError("The server is stopping.")
        # The next model of this name counts from the beginning.
        with suppress(ValueError):
            self._metrics.models.remove(self)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()
        self._give_up(self._closed)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    def _look_at_end(self, task: "asyncio.Task[None]") -> None:
        """Nobody may wait for an engine that does not come, be it by a mistake in this class."""
        if task.cancelled() or (fault := task.exception()) is None:
            return
        self._loop.call_exception_handler({"message": "no engine", "exception": fault})
        self._closed = StepFailedError(
            f"The server met an error that it did not expect, and computes {self.name} no more; "
            "its log has it."
        )
        self._give_up(self._closed)

    def _cancel_soon(self, id_: int) -> None:
        """As :meth:`_cancel`, from any thread, a garbage collection included."""
        with suppress(RuntimeError):  # The loop is closed, and all are cancelled.
            self._loop.call_soon_threadsafe(self._cancel, id_)

    def _cancel(self, id_: int) -> None:
        if (asked := self._asked.pop(id_, None)) is not None:
            self._leave(asked)
            self._metrics.ended(self.name, asked.times, self._last_used, "abort")
            if self._engine is not None:
                self._engine.send(Cancel(id_))
                self._give_out()

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
            self._stats = engine.ready.stats
            self._max_tokens = engine.ready.max_tokens
            self._last_used = time.monotonic()
            if not self._ready.done():
                self._ready.set_result(engine.ready)
            self._held = {**self._asked}
            self._give_out()
            told = await self._until_end(engine)
            self._engine = None
            self._stats_before, self._stats = self.total_stats, _at_rest(engine.ready.stats)
            self._ready = self._loop.create_future()
            self._wanted.clear()
            await engine.close()
            if not told:
                self._count_death(engine.fate)
            if self._asked:
                self._wanted.set()

    def _give_out(self) -> None:
        """Gives the engine what it has not; a suspect alone, until that has a token."""
        if self._engine is None or not self._held:
            return
        given = (asked for id_, asked in self._asked.items() if id_ not in self._held)
        if any(asked.is_suspect for asked in given):
            return
        suspects = [asked for asked in self._held.values() if asked.is_suspect]
        suspects.sort(key=lambda asked: asked.num_deaths)
        for asked in suspects[:1] or [*self._held.values()]:
            del self._held[asked.begin.id]
            self._engine.send(asked.again())

    async def _until_end(self, engine: EngineProcess) -> bool:
        """Waits for the engine's end; whether it was idle and told to."""
        while not engine.ended.is_set():
            try:
                await asyncio.wait_for(engine.ended.wait(), self._seconds_to_idle())
            except TimeoutError:
                if not self._asked and self._seconds_to_idle() == 0:
                    return True
        return False

    def _seconds_to_idle(self) -> float | None:
        if self._idle_seconds is None:
            return None
        if self._asked:
            return self._idle_seconds
        return max(0.0, self._last_used + self._idle_seconds - time.monotonic())

    async def _failed_to_start(self, error: ExpertdError) -> None:
        """Tries again in a moment, or tells those who wait."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._say(f"no engine of {self.name} starts: {error}")
        passes = type(error) in _LOST
        if passes and now - self._failing_since < self.spec.reattach_seconds:
            await asyncio.sleep(RETRY_SECONDS)
            return
        self._failing_since = None
        self._wanted.clear()
        self._give_up(error)

    def _give_up(self, error: ExpertdError) -> None:
        """Tells those who wait for an engine, or for tokens."""
        ready, self._ready = self._ready, self._loop.create_future()
        if not ready.done():
            ready.set_exception(error)
        ready.exception()  # Whoever waits gets it; there may be nobody.
        for id_ in [*self._asked]:
            self._end(id_, error)

    def _count_death(self, fate: str) -> None:
        self.num_deaths += 1
        self._metrics.engine_died(self.name)
        self._say(
            f"the engine of {self.name} {fate}; another one goes on with {len(self._asked)} "
            "sequences"
        )
        for id_, asked in [*self._asked.items()]:
            if id_ in self._held:
                continue
            asked.num_deaths += 1
            if asked.num_deaths >= MAX_DEATHS:
                self._end(
                    id_,
                    StepFailedError(
                        f"{MAX_DEATHS} engines ended while they computed this sequence; the "
                        "server's log may say why."
                    ),
                )

    def _progress(self, progress: Progress) -> None:
        now = time.monotonic()
        self.num_tokens += len(progress.tokens)
        for id_, token in progress.tokens:
            if (asked := self._asked.get(id_)) is not None:
                if asked.generated and token.opening is not None:
                    # An engine that goes on begins anew; the client has had its beginning.
                    token = replace(token, opening=None)
                asked.generated.append(token.id)
                asked.num_deaths = 0
                queued = None if token.opening is None else token.opening.queued_seconds
                self._metrics.token(self.name, asked.times, now, queued)
                self._accounts.take_tokens(asked.begin.origin.user, 1, now)
                if token.finish_reason is not None:
                    asked.reason = token.finish_reason.value
                asked.channel.send([token])
        for id_, failure in progress.ended:
            error = None if failure is None else failure.error()
            if type(error) in _LOST and self._engine is not None:
                # Its sequences go on with the next engine.
                self._engine.abandon()
                break
            self._end(id_, error)
        self._give_out()
        if progress.stats is not None:
            self._stats = progress.stats

    def _end(self, id_: int, error: ExpertdError | None) -> None:
        if (asked := self._asked.pop(id_, None)) is not None:
            self._leave(asked)
            if error is None:
                self._metrics.ended(self.name, asked.times, self._last_used, asked.reason)
            else:
                self._metrics.failed(self.name, type(error).__name__)
            asked.channel.end(error)

    def _leave(self, asked: _Asked) -> None:
        self._held.pop(asked.begin.id, None)
        self._last_used = time.monotonic()
        self._accounts.end(asked.begin.origin.user)


def _at_rest(stats: EngineStats) -> EngineStats:
    """Of a model without an engine: nothing runs, and nothing was done since the last."""
    return structs.replace(
        stats,
        num_steps=0,
        num_rows=0,
        num_running=0,
        num_waiting=0,
        prefix_queries=0,
        prefix_hits=0,
        num_preemptions=0,
        kv_used=0.0,
    )

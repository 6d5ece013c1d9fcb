"""A model as the front has it: its engines start when somebody asks, and may die unnoticed."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from msgspec import structs

from expertd_inference.engine.channel import Channel
from expertd_inference.engine.prefix import block_names
from expertd_inference.engine.sequence import ORIGIN, Origin, prefix_salt
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.kv.pool import BLOCK_TOKENS
from expertd_inference.server.accounts import Accounts
from expertd_inference.server.hosting.asked import Asked
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.engine_choice import find_relief
from expertd_inference.server.hosting.engine_seat import LOST, EngineSeat, choose_seat
from expertd_inference.server.hosting.link import check_sendable
from expertd_inference.server.hosting.messages import Begin, Cancel, Progress, Ready
from expertd_inference.server.metrics import ABORTED, ServerMetrics, Times
from expertd_inference.settings import GenerationSettings
from expertstore.errors import ExpertdError, PreconditionError, StepFailedError

MAX_DEATHS = 8
"""A sequence during which so many engines end, without a token between, is given up."""


class HostedModel:
    """Sequences of one model, by engines that start at the first and end when idle.

    Each has a seat. A sequence goes to the engine that has most of its prefix, unless that has
    much more to do than another (:mod:`.engine_choice`). An engine that ends before its sequences,
    killed or without its store, costs them a pause: another one goes on after the tokens that were
    delivered, one that is there at once, else the next of its seat. Sequences that may be why
    engines ended are given out one by one, so that no other ends with them. If no engine can be
    had for ``spec.reattach_seconds``, they end with the error. Everything is for one event loop.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        *,
        accounts: Accounts,
        metrics: ServerMetrics,
        idle_seconds: float | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``specs`` are of one model, one for each engine."""
        self.name = specs[0].model
        self.num_tokens = 0
        """Generated, of all sequences."""
        self._accounts = accounts
        self._metrics = metrics
        self._idle_seconds = idle_seconds
        self._say = say
        self._ids = itertools.count()
        self._asked: set[Asked] = set()
        self._last_used = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._closed: ExpertdError | None = None
        """What is told to those who ask, once there will be no engine any more."""
        self.seats = [EngineSeat(number, spec, self) for number, spec in enumerate(specs)]
        """Of its engines."""
        metrics.add(self)

    def __repr__(self) -> str:
        return f"<HostedModel {self.name}: {self.seats!r}>"

    @property
    def num_engines(self) -> int:
        """That have loaded the model."""
        return sum(seat.is_up for seat in self.seats)

    @property
    def num_deaths(self) -> int:
        """Engines that ended before they were told to."""
        return sum(seat.num_deaths for seat in self.seats)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that fits in every engine; None before one has said so."""
        return min((seat.max_tokens for seat in self.seats if seat.max_tokens), default=None)

    @property
    def num_sequences(self) -> int:
        """Which are not complete."""
        return len(self._asked)

    @property
    def num_places(self) -> int:
        """How many sequences are computed together."""
        return sum(seat.spec.limits.max_sequences for seat in self.seats)

    async def ready(self) -> list[Ready]:
        """Starts engines where there are none, and waits for all. Raises what loading raises."""
        self._check_open()
        self._last_used = time.monotonic()
        return await asyncio.gather(*(seat.ready() for seat in self.seats))

    def submit(
        self,
        tokens: Sequence[int],
        settings: GenerationSettings,
        origin: Origin = ORIGIN,
        images: tuple[bytes, ...] = (),
    ) -> TokenStream:
        """As :meth:`Engine.submit` for tokens, but most errors of the request come by the stream.

        Raises BusyError if the origin's user has as many sequences as it may, InvalidInputError
        for a number that 64 bits cannot hold, and once it is closed what it was closed with.
        """
        self._check_open()
        if settings.seed is None:
            # The next engine must draw what this one would have.
            settings = replace(settings, seed=secrets.randbits(64))
        origin = replace(origin, priority=self._accounts.priority_of(origin.user, origin.priority))
        begin = Begin(next(self._ids), [*tokens], settings, origin, images)
        # Before it counts: what cannot be sent would also fail at the next engine's start.
        check_sendable(begin)
        self._accounts.begin(origin.user)
        now = time.monotonic()
        self._accounts.take_tokens(origin.user, len(tokens), now)
        self._metrics.began(self.name, len(tokens))
        for seat in self.seats:
            seat.want()
        candidates = [seat for seat in self.seats if seat.is_up] or self.seats
        seat = choose_seat(candidates, begin.tokens, prefix_salt(origin, settings))
        asked = Asked(begin, Channel(), Times(now), seat)
        self._asked.add(asked)
        seat.give(asked)
        cancel = partial(self._cancel_soon, asked)
        return TokenStream(asked.channel, cancel, num_prompt_tokens=len(tokens))

    async def close(self, error: ExpertdError | None = None) -> None:
        """Ends its engines; who asks or waits is told ``error``, or that the server is stopping."""
        self._closed = error or PreconditionError("The server is stopping.")
        # The next model of this name counts from the beginning.
        with suppress(ValueError):
            self._metrics.models.remove(self)
        await asyncio.gather(*(seat.close() for seat in self.seats))
        self._give_up(self._closed)

    def started(self, seat: EngineSeat) -> None:
        """Of :class:`.engine_seat.SeatOwner`."""
        del seat
        self._last_used = time.monotonic()
        self._relieve()

    def stands_empty(self, seat: EngineSeat) -> None:
        """Of SeatOwner."""
        others = [other for other in self.seats if other.is_up]
        if others:
            self._move_all(seat, others)

    def failed(self, seat: EngineSeat, error: ExpertdError) -> None:
        """Of SeatOwner."""
        self._say(f"no engine of {self.name} starts: {error}")

    def died(self, seat: EngineSeat, fate: str, num_sequences: int) -> None:
        """Of SeatOwner."""
        self._metrics.engine_died(self.name, seat.number)
        self._say(
            f"the engine of {self.name} {fate}; another one goes on with {num_sequences} sequences"
        )

    def lost(self, seat: EngineSeat) -> None:
        """Of SeatOwner."""
        for id_, asked in [*seat.sequences.items()]:
            if id_ in seat.held:
                continue
            asked.num_deaths += 1
            if asked.num_deaths >= MAX_DEATHS:
                self._end(
                    asked,
                    StepFailedError(
                        f"{MAX_DEATHS} engines ended while they computed this sequence; the "
                        "server's log may say why."
                    ),
                )
        self.stands_empty(seat)

    def gave_up(self, seat: EngineSeat, error: ExpertdError) -> None:
        """Of SeatOwner."""
        others = [other for other in self.seats if other.is_up or other.is_starting]
        if others:
            self._move_all(seat, others)
        for asked in [*seat.sequences.values()]:
            self._end(asked, error)

    def progressed(self, seat: EngineSeat, progress: Progress) -> None:
        """Of SeatOwner."""
        now = time.monotonic()
        # A sequence that has moved goes on elsewhere, whatever its engine before says of it.
        for id_, token in progress.tokens:
            if (asked := seat.sequences.get(id_)) is not None:
                self._take(asked, token, now)
        lost = False
        for id_, failure in progress.ended:
            error = None if failure is None else failure.error()
            if failure is not None and not failure.refuses and type(error) in LOST:
                lost = True
            elif (asked := seat.sequences.get(id_)) is not None:
                self._end(asked, error)
        if lost:
            # Its sequences go on with another engine.
            seat.abandon()

    def broke(self, fault: BaseException) -> None:
        """Of SeatOwner. Nobody may wait for an engine that does not come."""
        self._loop.call_exception_handler({"message": "no engine", "exception": fault})
        self._closed = StepFailedError(
            f"The server met an error that it did not expect, and computes {self.name} no more; "
            "its log has it."
        )
        self._give_up(self._closed)

    def seconds_to_idle(self) -> float | None:
        """Of SeatOwner."""
        if self._idle_seconds is None:
            return None
        if self._asked:
            return max(1.0, self._idle_seconds)
        return max(0.0, self._last_used + self._idle_seconds - time.monotonic())

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    def _give_up(self, error: ExpertdError) -> None:
        """Tells those who wait for engines, or for tokens."""
        for seat in self.seats:
            seat.refuse(error)
        for asked in [*self._asked]:
            self._end(asked, error)

    def _take(self, asked: Asked, token: Token, now: float) -> None:
        self.num_tokens += 1
        if asked.generated and token.opening is not None:
            # An engine that goes on begins anew; the client has had its beginning.
            token = replace(token, opening=None)
        asked.generated.append(token.id)
        asked.num_deaths = 0
        queued = None if token.opening is None else token.opening.queued_seconds
        if token.opening is not None and (more := token.opening.num_image_tokens):
            # Which only an engine can tell.
            self._metrics.saw(self.name, more)
            self._accounts.take_tokens(asked.begin.origin.user, more, now)
        self._metrics.token(self.name, asked.times, now, queued)
        self._accounts.take_tokens(asked.begin.origin.user, 1, now)
        if token.finish_reason is not None:
            asked.reason = token.finish_reason.value
        asked.channel.send([token])

    def _end(self, asked: Asked, error: ExpertdError | None) -> None:
        self._leave(asked)
        if error is None:
            self._metrics.ended(self.name, asked.times, self._last_used, asked.reason)
        else:
            self._metrics.failed(self.name, type(error).__name__)
        asked.channel.end(error)

    def _cancel_soon(self, asked: Asked) -> None:
        """As :meth:`_cancel`, from any thread, a garbage collection included."""
        with suppress(RuntimeError):  # The loop is closed, and all are cancelled.
            self._loop.call_soon_threadsafe(self._cancel, asked)

    def _cancel(self, asked: Asked) -> None:
        if asked in self._asked:
            asked.seat.send(Cancel(asked.begin.id))
            self._leave(asked)
            self._metrics.ended(self.name, asked.times, self._last_used, ABORTED)

    def _leave(self, asked: Asked) -> None:
        self._asked.remove(asked)
        asked.seat.take(asked)
        self._last_used = time.monotonic()
        self._accounts.end(asked.begin.origin.user)
        if len(self.seats) > 1 and asked.generated:
            tokens, salt = asked.tokens, prefix_salt(asked.begin.origin, asked.begin.settings)
            asked.seat.prefixes.remember(block_names(tokens, salt, len(tokens) // BLOCK_TOKENS))
        self._relieve()

    def _relieve(self) -> None:
        """Sequences that wait in one engine take the places that are free in others."""
        up = [seat for seat in self.seats if seat.is_up]
        while (found := find_relief([seat.load for seat in up])) is not None:
            source, target = (up[index] for index in found)
            # The last to come that has begun nothing; it would wait longest.
            waiting = [asked for asked in source.sequences.values() if not asked.generated]
            if not waiting:
                return
            source.send(Cancel(waiting[-1].begin.id))
            self._move(waiting[-1], target)

    def _move_all(self, seat: EngineSeat, others: Sequence[EngineSeat]) -> None:
        for asked in [*seat.sequences.values()]:
            salt = prefix_salt(asked.begin.origin, asked.begin.settings)
            self._move(asked, choose_seat(others, asked.tokens, salt))

    def _move(self, asked: Asked, seat: EngineSeat) -> None:
        asked.seat.take(asked)
        # Under its old number its engine before may still speak of it.
        asked.begin = structs.replace(asked.begin, id=next(self._ids))
        asked.seat = seat
        seat.give(asked)

"""Has the engines on one set of cores compute one after the other."""

import asyncio
from typing import Protocol

from expertd_inference.server.hosting.messages import Turn
from expertd_inference.server.hosting.turn_table import TurnTable


class TurnTaker(Protocol):
    """An engine's process."""

    def send(self, message: Turn) -> None:
        """To the engine."""


class Turns:
    """Says to each engine when its turn begins, and when it is to end, after the step it is in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._table: TurnTable[TurnTaker] = TurnTable()
        self._timer: asyncio.TimerHandle | None = None

    def want(self, engine: TurnTaker) -> None:
        """It has a step to compute, and no turn or none any more."""
        self._table.want(engine, self._loop.time())
        self._decide()

    def leave(self, engine: TurnTaker) -> None:
        """It computes nothing for now."""
        self._table.leave(engine, self._loop.time())
        self._decide()

    def forget(self, engine: TurnTaker) -> None:
        """Its process has ended."""
        self._table.forget(engine, self._loop.time())
        self._decide()

    def _decide(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        decision = self._table.decide(self._loop.time())
        if decision.grant is not None:
            decision.grant.send(Turn(mine=True))
        if decision.recall is not None:
            decision.recall.send(Turn(mine=False))
        if decision.seconds is not None:
            self._timer = self._loop.call_later(decision.seconds, self._decide)

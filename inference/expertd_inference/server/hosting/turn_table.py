"""Whose turn it is to compute, among engines on one set of cores; pure: no clock, no process."""

from typing import Generic, NamedTuple, TypeVar

SLICE_SECONDS = 0.02
"""So long an engine computes at least while others wait, or one step."""
STUCK_SECONDS = 10.0
"""An engine that was asked for its turn and has not given it back by then is passed over."""
CREDIT_SECONDS = 0.05
"""How far an engine that had nothing to do may be behind the others."""

EngineT = TypeVar("EngineT")


class Decision(NamedTuple, Generic[EngineT]):
    """What is to be said to which engine, and after how many seconds to decide again."""

    grant: EngineT | None = None
    recall: EngineT | None = None
    seconds: float | None = None


class TurnTable(Generic[EngineT]):
    """Gives each engine that wants to compute an equal share of time.

    The one that computed least is next. It keeps its turn while it is behind all that wait, and at
    least for a slice; without others that wait, for as long as it likes. All times are of the
    caller's clock.
    """

    def __init__(self) -> None:
        self._waiting: dict[EngineT, None] = {}
        self._used: dict[EngineT, float] = {}
        self._holder: EngineT | None = None
        self._since = 0.0
        self._recalled: float | None = None

    def __repr__(self) -> str:
        return f"<TurnTable: {self._holder!r} computes, {len(self._waiting)} wait>"

    def want(self, engine: EngineT, now: float) -> None:
        """It has a step to compute. If it is its turn, the turn ends."""
        if self._holder == engine:
            self._end_turn(now)
        elif engine not in self._waiting:
            self._used[engine] = self._used_by_newcomer(engine, now)
        self._waiting[engine] = None

    def leave(self, engine: EngineT, now: float) -> None:
        """It has nothing to compute, or has ended."""
        if self._holder == engine:
            self._end_turn(now)
        self._waiting.pop(engine, None)

    def forget(self, engine: EngineT, now: float) -> None:
        """It has ended."""
        self.leave(engine, now)
        self._used.pop(engine, None)

    def decide(self, now: float) -> Decision[EngineT]:
        """To be asked after each change, and when the seconds that it gave have passed."""
        if not self._waiting:
            return Decision()
        following = min(self._waiting, key=self._used.__getitem__)
        if self._holder is None:
            return self._grant(following, now)
        if self._recalled is not None:
            left = self._recalled + STUCK_SECONDS - now
            return Decision(seconds=left) if left > 0 else self._grant(following, now)
        behind = self._used[following] - self._used[self._holder]
        left = self._since + max(SLICE_SECONDS, behind) - now
        if left > 0:
            return Decision(seconds=left)
        self._recalled = now
        return Decision(recall=self._holder, seconds=STUCK_SECONDS)

    def _used_by_newcomer(self, engine: EngineT, now: float) -> float:
        """It has had nothing to do: what it and the others did before counts little."""
        used = self._used.get(engine, 0.0)
        others = [self._used[one] for one in self._waiting]
        if self._holder is not None:
            others.append(self._used[self._holder] + now - self._since)
        return min(max(used, min(others) - CREDIT_SECONDS), max(others)) if others else used

    def _grant(self, engine: EngineT, now: float) -> Decision[EngineT]:
        del self._waiting[engine]
        self._holder, self._since, self._recalled = engine, now, None
        return Decision(grant=engine, seconds=SLICE_SECONDS if self._waiting else None)

    def _end_turn(self, now: float) -> None:
        assert self._holder is not None
        self._used[self._holder] += now - self._since
        self._holder = self._recalled = None

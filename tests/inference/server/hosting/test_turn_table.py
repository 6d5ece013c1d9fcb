"""Turns are shared by time."""

import pytest

from expertd_inference.server.hosting.turn_table import (
    CREDIT_SECONDS,
    SLICE_SECONDS,
    STUCK_SECONDS,
    Decision,
    TurnTable,
)


class Host:
    """Engines that always have something to compute, in steps of so many seconds."""

    def __init__(self, **step_seconds: float) -> None:
        self.now = 0.0
        self.table: TurnTable[str] = TurnTable()
        self.step_seconds = step_seconds
        self.used = dict.fromkeys(step_seconds, 0.0)
        self.longest = dict.fromkeys(step_seconds, 0.0)
        """That each has waited for its turn."""
        self.holder: str | None = None
        self._recalled: str | None = None
        self._wanted: dict[str, float] = {}
        for engine in step_seconds:
            self.want(engine)

    def want(self, engine: str) -> None:
        self._wanted[engine] = self.now
        self.table.want(engine, self.now)
        self.act()

    def act(self) -> None:
        decision = self.table.decide(self.now)
        if decision.grant is not None:
            self.holder = decision.grant
            waited = self.now - self._wanted[self.holder]
            self.longest[self.holder] = max(self.longest[self.holder], waited)
            self._recalled = None
        self._recalled = decision.recall or self._recalled

    def compute(self, seconds: float) -> None:
        """Steps of whoever has the turn; the table is asked at the end of each, and not before."""
        end = self.now + seconds
        while self.now < end:
            engine = self.holder
            assert engine is not None
            self.now += self.step_seconds[engine]
            self.used[engine] += self.step_seconds[engine]
            self.act()
            if self._recalled == engine:
                self.want(engine)


@pytest.mark.parametrize(
    "steps", [{"a": 0.01, "b": 0.1}, {"a": 0.001, "b": 0.001}, {"a": 0.03, "b": 0.2, "c": 0.005}]
)
def test_each_has_as_much_time_however_long_its_steps_are(steps: dict[str, float]) -> None:
    host = Host(**steps)
    host.compute(60)
    share = 60 / len(steps)
    for engine in steps:
        assert host.used[engine] == pytest.approx(share, rel=0.03)
        assert host.longest[engine] < len(steps) * (max(steps.values()) + SLICE_SECONDS)


def test_alone_it_is_not_asked_for_its_turn() -> None:
    table: TurnTable[str] = TurnTable()
    table.want("a", 0.0)
    assert table.decide(0.0) == Decision(grant="a")
    assert table.decide(1000.0) == Decision()


def test_a_newcomer_waits_for_the_rest_of_the_slice_and_no_longer() -> None:
    table: TurnTable[str] = TurnTable()
    table.want("a", 0.0)
    table.decide(0.0)
    table.want("b", SLICE_SECONDS / 4)
    assert table.decide(SLICE_SECONDS / 4).seconds == pytest.approx(SLICE_SECONDS * 3 / 4)
    assert table.decide(SLICE_SECONDS).recall == "a"
    table.want("a", 2 * SLICE_SECONDS)
    assert table.decide(2 * SLICE_SECONDS).grant == "b"


def test_who_had_nothing_to_do_has_little_to_catch_up() -> None:
    host = Host(a=0.01, b=0.01)
    for absent, present in (("b", "a"), ("a", "b")):
        host.table.leave(absent, host.now)
        host.act()
        host.compute(100)
        host.want(absent)
        host.used = {"a": 0.0, "b": 0.0}
        host.compute(1)
        ahead = host.used[absent] - host.used[present]
        assert -2 * SLICE_SECONDS < ahead < CREDIT_SECONDS + 3 * SLICE_SECONDS


def test_whoever_leaves_or_dies_is_followed_at_once() -> None:
    table: TurnTable[str] = TurnTable()
    for engine in ("a", "b", "c"):
        table.want(engine, 0.0)
    assert table.decide(0.0).grant == "a"
    table.leave("a", 0.001)
    assert table.decide(0.001).grant == "b"
    table.forget("c", 0.002)
    table.forget("b", 0.003)
    assert table.decide(0.003) == Decision()


def test_an_engine_that_is_stuck_is_passed_over() -> None:
    table: TurnTable[str] = TurnTable()
    table.want("a", 0.0)
    table.decide(0.0)
    table.want("b", 1.0)
    assert table.decide(1.0) == Decision(recall="a", seconds=STUCK_SECONDS)
    assert table.decide(2.0).seconds == pytest.approx(STUCK_SECONDS - 1)
    assert table.decide(1.0 + STUCK_SECONDS).grant == "b"
    table.want("a", 30.0)  # it goes on, and waits like any other
    assert table.decide(30.0).recall == "b"

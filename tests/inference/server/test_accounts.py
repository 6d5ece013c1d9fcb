"""Limits of users, with a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.keys import KeyLimits
from expertstore.errors import BusyError

HASH = "0" * 64


def limits(**given: float | None) -> KeyLimits:
    return KeyLimits(sha256=HASH, **given)  # type: ignore[arg-type]


@given(
    per_minute=st.integers(1, 120),
    waits=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=200),
)
def test_no_minute_has_more_requests_than_two_limits(per_minute: int, waits: list[float]) -> None:
    accounts, now, granted = Accounts(), 0.0, []
    for wait in waits:
        now += wait
        if not accounts.seconds_until_request("a", limits(requests_per_minute=per_minute), now):
            granted.append(now)
    for begin in granted:
        within = [time for time in granted if begin <= time < begin + 60]
        # A full bucket, and what flows in meanwhile.
        assert len(within) <= 2 * per_minute
    allowed = per_minute + now / 60 * per_minute
    assert len(granted) <= allowed + 1


def test_who_waits_as_long_as_told_may_ask() -> None:
    accounts = Accounts()
    asked = limits(requests_per_minute=2)
    assert [accounts.seconds_until_request("a", asked, 0.0) for _ in range(3)] == [0, 0, 30]
    assert accounts.seconds_until_request("b", asked, 0.0) == 0
    assert accounts.seconds_until_request("a", asked, 29.0) == pytest.approx(1)
    assert accounts.seconds_until_request("a", asked, 30.0) == 0
    assert accounts.seconds_until_request("a", asked, 30.0) == pytest.approx(30)


def test_tokens_make_debts() -> None:
    accounts = Accounts()
    asked = limits(tokens_per_minute=60)
    assert accounts.seconds_until_request("a", asked, 0.0) == 0
    accounts.take_tokens("a", 100, 0.0)
    assert accounts.seconds_until_request("a", asked, 0.0) == pytest.approx(41)
    assert accounts.seconds_until_request("a", asked, 41.0) == 0
    # An hour later the bucket is full, and holds no more than that.
    accounts.take_tokens("a", 100, 3600.0)
    assert accounts.seconds_until_request("a", asked, 3600.0) == pytest.approx(41)


def test_a_limit_that_changes_begins_anew() -> None:
    accounts = Accounts()
    for per_minute in (1, 2):
        asked = limits(requests_per_minute=per_minute)
        granted = [accounts.seconds_until_request("a", asked, 0.0) == 0 for _ in range(3)]
        assert granted.count(True) == per_minute
    asked = limits(tokens_per_minute=60)
    accounts.seconds_until_request("b", asked, 0.0)
    accounts.seconds_until_request("b", limits(), 0.0)
    accounts.take_tokens("b", 1000, 0.0)
    assert accounts.seconds_until_request("b", asked, 0.0) == 0


def test_without_limits_nothing_is_counted() -> None:
    accounts = Accounts()
    for _ in range(1000):
        assert accounts.seconds_until_request("a", limits(), 0.0) == 0
        accounts.take_tokens("a", 1 << 30, 0.0)


def test_sequences_at_once() -> None:
    accounts = Accounts()
    accounts.seconds_until_request("a", limits(max_sequences=2), 0.0)
    accounts.begin("a")
    accounts.begin("a")
    with pytest.raises(BusyError, match="a has 2 sequences"):
        accounts.begin("a")
    accounts.end("a")
    accounts.begin("a")
    with pytest.raises(BusyError):
        accounts.begin("a")
    accounts.seconds_until_request("c", limits(), 0.0)
    for _ in range(5):
        accounts.begin("b")
        accounts.begin("c")
    for _ in range(4):
        accounts.end("c")
    assert accounts._sequences == {"a": 2, "b": 5, "c": 1}
    accounts.end("c")
    assert "c" not in accounts._sequences


def test_a_user_may_only_lower_its_priority() -> None:
    accounts = Accounts()
    assert accounts.priority_of("a", 5) == 5
    accounts.seconds_until_request("a", limits(priority=2), 0.0)
    assert [accounts.priority_of("a", wished) for wished in (5, 0, -3)] == [2, 2, -1]

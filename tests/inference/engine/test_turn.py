"""An engine's turn: asked for, granted, recalled, given back."""

import threading

import pytest

from expertd_inference.engine.turn import GrantedTurn
from expertd_testing.patience import HANG_SECONDS


class Asker:
    """Takes its turn in a thread of its own, as often as it is told to."""

    def __init__(self) -> None:
        self.said: list[bool] = []
        self._asked = threading.Semaphore(0)
        self.turn = GrantedTurn(self._say)

    def ask(self) -> threading.Thread:
        """Returns once the turn is asked for, and is waited for."""
        thread = threading.Thread(target=self.turn.take, daemon=True)
        thread.start()
        assert self._asked.acquire(timeout=HANG_SECONDS)
        assert thread.is_alive()
        return thread

    def take(self) -> None:
        """Asks, and is granted it."""
        thread = self.ask()
        self.turn.grant()
        assert ended(thread)

    def _say(self, wanted: bool) -> None:
        self.said.append(wanted)
        if wanted:
            self._asked.release()


@pytest.fixture
def asker() -> Asker:
    return Asker()


def ended(thread: threading.Thread) -> bool:
    thread.join(HANG_SECONDS)
    return not thread.is_alive()


def test_it_is_asked_for_once_and_kept_until_it_is_recalled(asker: Asker) -> None:
    asker.take()
    asker.turn.take()
    assert asker.said == [True]
    asker.turn.recall()
    asker.take()
    assert asker.said == [True, True]


def test_what_is_not_its_own_is_not_given_back(asker: Asker) -> None:
    asker.turn.leave()
    asker.take()
    asker.turn.leave()
    asker.turn.leave()
    assert asker.said == [True, False]


def test_a_recall_that_came_too_late_is_not_for_the_next_turn(asker: Asker) -> None:
    asker.take()
    asker.turn.leave()
    asker.turn.recall()
    asker.take()
    asker.turn.take()
    assert asker.said == [True, False, True]


def test_when_nobody_grants_any_more_steps_are_computed_all_the_same(asker: Asker) -> None:
    thread = asker.ask()
    asker.turn.free()
    assert ended(thread)
    asker.turn.leave()
    asker.turn.take()

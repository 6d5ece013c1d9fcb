"""A watcher hears of all accesses, or of how many it missed."""

import numpy as np
import pytest

import expertd.hosting.touch_watch
from expertd.hosting.touch_watch import TouchWatch


def entries(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


async def test_batches_come_in_order() -> None:
    watch = TouchWatch()
    watch.offer(1, entries(1, 2))
    watch.offer(2, entries(3), 5)
    watch.offer(1, entries())
    watch.offer(1, entries(), ended=True)
    batches = [await watch.take(1) for _ in range(3)]
    assert [(b.session, b.entries.tolist(), b.num_lost, b.ended) for b in batches if b] == [
        (1, [1, 2], 0, False), (2, [3], 5, False), (1, [], 0, True),
    ]  # fmt: skip
    assert await watch.take(0.01) is None


async def test_what_a_slow_watcher_loses_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expertd.hosting.touch_watch, "MAX_WAITING_TOUCHES", 4)
    watch = TouchWatch()
    watch.offer(1, entries(1, 2, 3))
    watch.offer(1, entries(4, 5))
    watch.offer(2, entries(6, 7), 10)
    first = await watch.take(1)
    assert first is not None
    assert first.entries.tolist() == [1, 2, 3]
    watch.offer(1, entries(8))
    second, third = await watch.take(1), await watch.take(0.01)
    assert second is not None
    assert third is not None
    assert (second.session, second.entries.tolist(), second.num_lost) == (1, [8], 2)
    assert (third.session, third.entries.tolist(), third.num_lost) == (2, [], 12)


async def test_a_closed_watch_gives_what_it_has_and_ends_at_once() -> None:
    watch = TouchWatch()
    watch.offer(1, entries(1))
    watch.close()
    assert await watch.take(60) is not None
    assert await watch.take(60) is None

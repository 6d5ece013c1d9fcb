"""What the daemon believes of a session page, and what not."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from expertd.hosting.hosted_model import MAX_LEARNED_TOUCHES
from expertd.settings.policy_names import PolicyName
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertstore.errors import PreconditionError
from expertstore.shared.handshake import Role
from expertstore.shared.session_page import MISSED, RING_ENTRIES
from tests.expert_store.in_memory import Worker, storing


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with storing(
        {"m": make_pack(tmp_path / "pack")}, 16 * PAGE, policy=PolicyName.AGED
    ) as store:
        yield store


def heat(worker: Worker) -> list[float]:
    return worker.model.heat.of(np.arange(24)).tolist()


async def test_touches_become_heat_and_counts(store: Store) -> None:
    worker = Worker(store)
    worker.page.touch([1, 2, 2], frozenset({2}))
    worker.session.refresh()
    counters = worker.model.counters
    assert (counters.host_hits, counters.nvme_misses) == (1, 2)
    assert heat(worker)[2] == 2 * heat(worker)[1] > 0
    worker.session.refresh()
    assert (counters.host_hits, counters.nvme_misses) == (1, 2), "counted once"


async def test_a_ring_that_was_overrun_loses_heat_but_no_counts(store: Store) -> None:
    worker = Worker(store)
    worker.page.touch([3] * 10)
    for start in range(0, RING_ENTRIES, 64):
        worker.page.touch([4] * 64, frozenset({4}) if start == 0 else frozenset())
    worker.session.refresh()
    counters = worker.model.counters
    assert (counters.host_hits, counters.nvme_misses) == (RING_ENTRIES - 54, 64)
    assert heat(worker)[3] == 0
    assert heat(worker)[4] > 0


async def test_of_many_touches_in_many_sessions_the_newest_are_learned(store: Store) -> None:
    workers = [Worker(store) for _ in range(4)]
    share = MAX_LEARNED_TOUCHES // len(workers)
    workers[0].page.touch([3] * share)
    workers[0].page.touch([4] * share)
    workers[0].session.refresh()
    assert heat(workers[0])[3] == 0
    assert heat(workers[0])[4] > 0
    assert workers[0].model.counters.host_hits == 2 * share, "all are counted"


async def test_the_ring_wraps(store: Store) -> None:
    worker = Worker(store)
    worker.page.touch([1] * (RING_ENTRIES - 1))
    worker.session.refresh()
    worker.page.touch([5, 6, 7])
    worker.session.refresh()
    assert min(heat(worker)[5:8]) >= 1
    assert worker.model.counters.host_hits == RING_ENTRIES + 2


@pytest.mark.parametrize(
    ("touches", "misses"),
    [(1 << 63, 0), (2**64 - 1, 2**64 - 1), (3, 4), ((1 << 32) + 1, 0)],
    ids=["leap", "all ones", "more misses than touches", "more than can be"],
)
async def test_counters_that_lie_are_not_believed(store: Store, touches: int, misses: int) -> None:
    worker = Worker(store)
    words = store_words(worker)
    words[4], words[5] = touches, misses
    worker.session.refresh()
    counters = worker.model.counters
    assert (counters.host_hits, counters.nvme_misses) == (0, 0)
    words[4] = words[5] = 0  # backwards
    worker.session.refresh()
    assert (counters.host_hits, counters.nvme_misses) == (0, 0)
    worker.page.touch([1])
    worker.session.refresh()
    assert counters.host_hits == 1, "the next honest round counts"


async def test_touches_of_no_expert_are_ignored(store: Store) -> None:
    worker = Worker(store)
    worker.page.ring[0], worker.page.ring[1] = 24, MISSED - 1
    store_words(worker)[4] = 2
    worker.session.refresh()
    assert heat(worker) == [0.0] * 24


async def test_a_session_detached_with_touches_unread_is_counted(store: Store) -> None:
    worker = Worker(store)
    worker.page.touch([1, 2])
    store.detach(worker.session)
    assert worker.model.counters.host_hits == 2


async def test_an_epoch_from_the_future_is_no_lag(store: Store) -> None:
    worker = Worker(store)
    worker.page.epoch = 2**64 - 1
    assert worker.session.epoch_lag == 0
    worker.page.epoch = 0
    assert worker.session.epoch_lag == 1


async def test_only_the_worker_s_own_standing_still_counts(store: Store) -> None:
    session = Worker(store).session
    assert session.stalled_seconds(1000.0) == 0
    # The daemon itself was not asked for a while: the host slept, and the worker with it.
    assert session.stalled_seconds(1100.0) < 0.1
    for tick in range(100):
        stalled = session.stalled_seconds(1100.0 + tick / 100)
    assert 0.9 < stalled < 1.1
    session.model.directory.advance_epoch()
    session.page.epoch += 1
    assert session.stalled_seconds(1102.0) == 0


async def test_a_fetch_of_nothing_leaves_no_lease(store: Store) -> None:
    worker = Worker(store)
    assert await worker.fetch() == 0
    assert not worker.session.holds_leases


async def test_only_workers_have_a_model(store: Store) -> None:
    worker = Worker(store)
    reader = store.attach(Role.READER, "", worker, 1, 0)
    with pytest.raises(PreconditionError, match="session for reader"):
        _ = reader.model
    reader.refresh()
    assert (reader.epoch_lag, reader.model_name, reader.is_worker) == (0, "", False)


def store_words(worker: Worker) -> memoryview:
    """The page as its worker may write it."""
    return worker.session.memory.view[:PAGE].cast("Q")

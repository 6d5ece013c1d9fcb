"""What one user may keep at once; that others do not notice who sits at his quota."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import CapacityError, SessionLostError
from tests.expert_store.in_memory import Worker, assert_nothing_held, disk, storing, until

RECORD = 2 * PAGE
ALICE, BOB, CAROL = 1000, 1001, 1002


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("quotas") / "pack")


@pytest.fixture
async def store(pack: Path) -> AsyncIterator[Store]:
    """Room for 16 records; Alice may keep 6, Bob 8 at once, and Carol as many as there are."""
    quotas = {ALICE: 6 * RECORD, BOB: 8 * RECORD}
    async with storing({"m": pack}, 16 * RECORD, quotas=quotas) as store:
        yield store


async def test_a_fetch_of_more_is_told_how_many_fit(store: Store) -> None:
    alice, bob = Worker(store, uid=ALICE), Worker(store, uid=BOB)
    with pytest.raises(CapacityError) as caught:
        await alice.fetch(*range(7))
    assert str(caught.value) == (
        "the quota of uid 1000 is 48.0 KiB, and its sessions keep 0 B, of which 0 B pinned: 7 more "
        "experts of m, 56.0 KiB, exceed it; fetch in waves of 6."
    )
    error = caught.value
    assert (error.requested, error.available, error.unit) == (7, 6, "records")
    assert await alice.fetch(*range(6)) == 6
    assert await bob.fetch(*range(8)) == 2
    assert await Worker(store, uid=CAROL).fetch(*range(16)) == 8


async def test_pins_and_leases_count(store: Store) -> None:
    pinner, alice = Worker(store, uid=ALICE), Worker(store, uid=ALICE)
    assert await store.records.pin(pinner.session, [0, 1]) == 2
    with pytest.raises(CapacityError, match=r"keep 16\.0 KiB, of which 16\.0 KiB pinned.*of 4\."):
        await alice.fetch(*range(2, 8))
    assert await alice.fetch(0, 1, 2, 3, 4, 5) == 4, "what is pinned counts once"
    with pytest.raises(CapacityError, match="unpin or release some first"):
        await asyncio.wait_for(alice.fetch(6), HANG_SECONDS)  # its own lease, which no waiting ends
    assert store.quotas.kept_by(ALICE).all.num_bytes == 6 * RECORD
    alice.release()
    store.slots.refresh()
    assert store.quotas.kept_by(ALICE).all.num_bytes == 2 * RECORD
    with pytest.raises(CapacityError, match="5 more experts"):
        await store.records.pin(alice.session, range(6, 11))
    assert alice.session.pins == set()
    pinner.session.unpin([0, 1])
    assert await store.records.pin(alice.session, range(6, 11)) == 5


async def test_leases_of_the_same_user_s_others_are_waited_for(store: Store) -> None:
    first, second, third = (Worker(store, uid=ALICE) for _ in range(3))
    await first.fetch(*range(4))
    large = asyncio.create_task(second.fetch(*range(4, 10)))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(third.fetch(0))
    await asyncio.sleep(0.02)
    assert not large.done()
    assert not small.done(), "it came later, and the large one would starve"
    assert await asyncio.wait_for(Worker(store, uid=BOB).fetch(*range(8)), HANG_SECONDS) == 4
    first.release()
    assert await large == 2
    await asyncio.sleep(0.02)
    assert not small.done()
    second.release()
    assert await small == 0
    third.release()


async def test_who_waits_in_vain_is_told_of_the_quota(pack: Path) -> None:
    settings = {"quotas": {ALICE: 6 * RECORD}, "fetch_seconds": 0.3}
    async with storing({"m": pack}, 16 * RECORD, **settings) as store:
        holder, other = Worker(store, uid=ALICE), Worker(store, uid=ALICE)
        await holder.fetch(*range(4))
        with pytest.raises(CapacityError, match=r"keep 32\.0 KiB.*waves of 2"):
            await other.fetch(*range(8, 12))
        assert await other.fetch(8, 9) == 2


async def test_a_fetch_under_way_counts(store: Store) -> None:
    file = disk(store.models["m"])
    file.faults.gate.clear()
    first, second = Worker(store, uid=ALICE), Worker(store, uid=ALICE)
    reading = asyncio.create_task(first.fetch(*range(4)))
    await until(lambda: len(file.offsets) >= 2)
    waiting = asyncio.create_task(second.fetch(*range(4, 8)))
    await asyncio.sleep(0.02)
    assert store.quotas.kept_by(ALICE).all.num_bytes == 4 * RECORD
    assert len(store.models["m"].loads) == 4
    file.faults.gate.set()
    assert await reading == 4
    first.release()
    assert await waiting == 4


@pytest.mark.parametrize("how", ["cancelled", "detached"])
async def test_who_gives_up_waiting_leaves_nothing(store: Store, how: str) -> None:
    holder, other = Worker(store, uid=ALICE), Worker(store, uid=ALICE)
    await holder.fetch(*range(6))
    fetch = asyncio.create_task(other.fetch(8))
    await asyncio.sleep(0.01)
    if how == "cancelled":
        fetch.cancel()
    else:
        store.detach(other.session)
    with pytest.raises((asyncio.CancelledError, SessionLostError)):
        await fetch
    holder.release()
    assert_nothing_held(store)
    assert store.quotas.kept_by(ALICE).all.num_bytes == 0
    assert await Worker(store, uid=ALICE).fetch(*range(6)) == 0


async def test_the_default_is_for_all_others(pack: Path) -> None:
    settings = {"quotas": {ALICE: 6 * RECORD}, "default_quota_bytes": RECORD}
    async with storing({"m": pack}, 16 * RECORD, **settings) as store:
        assert await Worker(store, uid=ALICE).fetch(0, 1) == 2
        with pytest.raises(CapacityError, match="uid 1002"):
            await Worker(store, uid=CAROL).fetch(0, 1)


async def test_sessions_of_a_user(pack: Path) -> None:
    async with storing({"m": pack}, 16 * RECORD, max_sessions_per_uid=2) as store:
        workers = [Worker(store, uid=ALICE), Worker(store, uid=ALICE)]
        with pytest.raises(CapacityError, match="2 sessions of uid 1000"):
            Worker(store, uid=ALICE)
        Worker(store, uid=BOB)
        store.detach(workers[0].session)
        Worker(store, uid=ALICE)

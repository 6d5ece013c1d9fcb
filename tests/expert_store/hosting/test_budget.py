"""Several models, one budget: what each keeps, what none exceeds, and where the room goes."""

import asyncio
import random
import re
from pathlib import Path

import pytest

from expertd.settings.limits import ModelLimits
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import CapacityError, ConfigError
from expertstore.sizes import parse_bytes
from tests.expert_store.in_memory import (
    Worker,
    assert_consistent,
    assert_nothing_held,
    disk,
    storing,
    until,
)


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Records of one, two and three pages; a token uses two of each, of 16."""
    path = tmp_path_factory.mktemp("budget")
    return {
        name: make_pack(
            path / name, layers=2, experts=8, experts_per_token=1, record_bytes=pages * PAGE
        )
        for name, pages in {"a": 1, "b": 1, "two": 2, "large": 3}.items()
    }


def only(packs: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: packs[name] for name in names}


async def use(worker: Worker, *entries: int) -> None:
    """One step of a worker."""
    await worker.fetch(*entries)
    worker.page.touch(entries)
    worker.release()


class TestMinimum:
    async def test_is_left_by_all_others(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(min_bytes=5 * PAGE)}
        async with storing(only(packs, "a", "b"), 12 * PAGE, limits) as store:
            quiet, busy = Worker(store, "a"), Worker(store, "b")
            await use(quiet, *range(8))
            for start in range(40):
                await use(busy, *[(start + i) % 16 for i in range(5)])
                assert quiet.model.num_resident >= 5
            assert quiet.model.num_resident == 5
            assert busy.model.num_resident == 7
            assert_consistent(store)

    async def test_keeps_the_hottest(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(min_bytes=3 * PAGE)}
        async with storing(only(packs, "a", "b"), 8 * PAGE, limits) as store:
            quiet, busy = Worker(store, "a"), Worker(store, "b")
            await use(quiet, *range(8))
            for _ in range(5):
                await use(quiet, 1, 4, 6)
            await use(busy, *range(5))
            assert {e for e in range(16) if quiet.model.is_resident(e)} == {1, 4, 6}

    async def test_does_not_hinder_its_own_model(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(min_bytes=6 * PAGE)}
        async with storing(only(packs, "a", "b"), 8 * PAGE, limits) as store:
            worker = Worker(store, "a")
            await use(worker, *range(8))
            await asyncio.wait_for(worker.fetch(*range(8, 16)), HANG_SECONDS)
            assert worker.model.num_resident == 8

    async def test_is_taken_back_when_it_is_wanted(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(min_bytes=6 * PAGE)}
        async with storing(only(packs, "a", "b"), 8 * PAGE, limits) as store:
            late, early = Worker(store, "a"), Worker(store, "b")
            await use(early, *range(2))
            assert store.budget.max_fetch_records(early.model) == 2
            assert await asyncio.wait_for(late.fetch(*range(6)), HANG_SECONDS) == 6

    async def test_that_lies_scattered_moves(self, packs: dict[str, Path]) -> None:
        """Guarded records leave room by size for a larger one, but no gap."""
        limits = {"a": ModelLimits(min_bytes=6 * PAGE)}
        async with storing(only(packs, "a", "large"), 12 * PAGE, limits) as store:
            little, large = Worker(store, "a"), Worker(store, "large")
            await use(little, *range(12))
            for _ in range(4):
                await use(little, 1, 3, 5, 7, 9, 11)  # .x.x.x.x.x.x
            reads = len(disk(little.model).offsets)
            assert store.budget.max_fetch_records(large.model) == 2
            assert await asyncio.wait_for(large.fetch(0, 1), HANG_SECONDS) == 2
            assert little.model.num_resident == 6
            assert len(disk(little.model).offsets) == reads
            assert_consistent(store)

    async def test_that_cannot_move_is_read_again(self, packs: dict[str, Path]) -> None:
        """No hole is as large as the guarded records, and the sum fits."""
        async with storing(only(packs, "a", "two", "large"), 13 * PAGE) as store:
            little, large = Worker(store, "a"), Worker(store, "large")
            for entry in range(3):
                await use(little, entry)
                await use(large, entry)
            await use(little, 3)
            await asyncio.wait_for(store.unload_model("a"), HANG_SECONDS)  # .LLL.LLL.LLL.
            await store.set_limits("large", 9 * PAGE, None)
            other = Worker(store, "two")
            assert store.budget.max_fetch_records(other.model) == 2
            assert await asyncio.wait_for(other.fetch(0, 1), HANG_SECONDS) == 2
            await until(lambda: large.model.num_resident == 3)
            assert len(disk(large.model).offsets) == 4
            assert_consistent(store)


class TestMaximum:
    async def test_is_never_exceeded(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(max_bytes=5 * PAGE)}
        async with storing(only(packs, "a", "b"), 16 * PAGE, limits) as store:
            capped, other = Worker(store, "a"), Worker(store, "b")
            await use(other, *range(8))
            for start in range(12):
                await use(capped, *[(start * 3 + i) % 16 for i in range(4)])
                assert capped.model.arena_bytes <= 5 * PAGE
            assert other.model.num_resident == 8, "it evicts its own"
            with pytest.raises(CapacityError, match="waves of 5"):
                await capped.fetch(*range(6))
            store.records.prefetch(capped.session, list(range(16)), 0)
            await asyncio.sleep(0.05)
            assert capped.model.arena_bytes <= 5 * PAGE
            assert_consistent(store)

    async def test_waits_for_those_who_read_its_own(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(max_bytes=5 * PAGE)}
        async with storing(only(packs, "a"), 16 * PAGE, limits) as store:
            reader, other = Worker(store, "a"), Worker(store, "a")
            await use(reader, *range(5))
            reader.holding = True
            fetch = asyncio.create_task(other.fetch(8))
            await asyncio.sleep(0.02)
            assert not fetch.done(), "free elsewhere, but not for this model"
            reader.holding = False
            assert await asyncio.wait_for(fetch, HANG_SECONDS) == 1

    async def test_is_lowered_at_once(self, packs: dict[str, Path]) -> None:
        async with storing(only(packs, "a"), 16 * PAGE) as store:
            worker = Worker(store, "a")
            await use(worker, *range(12))
            await store.set_limits("a", 0, 4 * PAGE)
            assert worker.model.num_resident == 4
            await store.set_limits("a", 0, None)
            assert await worker.fetch(*range(12)) == 8

    async def test_holds_what_is_pinned_and_a_token(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(max_bytes=5 * PAGE)}
        async with storing(only(packs, "a"), 16 * PAGE, limits) as store:
            worker = Worker(store, "a")
            with pytest.raises(CapacityError, match=r"within the maximum of a .* room for 3"):
                await store.records.pin(worker.session, [0, 1, 2, 3])
            assert await store.records.pin(worker.session, [0, 1, 2]) == 3
            with pytest.raises(CapacityError, match=r"the maximum of 'a' is 16\.0 KiB"):
                await store.set_limits("a", 0, 4 * PAGE)


class TestPins:
    async def test_are_read_after_loading_and_stay(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(pins=("0:*", "1:3"))}
        async with storing(only(packs, "a", "b"), 16 * PAGE, limits) as store:
            model, other = store.models["a"], Worker(store, "b")
            await until(lambda: model.num_resident == 9)
            for start in range(0, 16, 4):
                await use(other, *range(start, start + 4))
            assert all(model.is_resident(entry) for entry in (*range(8), 11))
            assert store.budget.max_fetch_records(model) == 7
            worker = Worker(store, "a")
            assert await worker.fetch(*range(16)) == 7
            worker.release()
            await asyncio.wait_for(store.unload_model("a"), HANG_SECONDS)
            assert store.budget.max_fetch_records(other.model) == 16

    async def test_give_up_what_is_lost(self, packs: dict[str, Path]) -> None:
        async with storing({}, 16 * PAGE) as store:
            model = await store.load_model("a", packs["a"], limits=ModelLimits(pins=("0:0-3",)))
            disk(model).faults.flipped.add(PAGE)
            await until(lambda: model.num_resident == 3)
            await until(lambda: model.pins == {1, 2, 3})
            assert model.counters.records_lost == 1
            await asyncio.wait_for(store.unload_model("a"), HANG_SECONDS)

    async def test_unloading_does_not_wait_for_them(self, packs: dict[str, Path]) -> None:
        async with storing({}, 20 * PAGE) as store:
            model = await store.load_model("a", packs["a"], limits=ModelLimits(pins=("*:*",)))
            disk(model).faults.gate.clear()
            await until(lambda: model.loads)
            unload = asyncio.create_task(store.unload_model("a"))
            await asyncio.sleep(0.01)
            disk(model).faults.gate.set()
            await asyncio.wait_for(unload, HANG_SECONDS)
            assert store.slots.extents.bytes_used == 0

    async def test_of_experts_that_do_not_exist(self, packs: dict[str, Path]) -> None:
        async with storing({}, 20 * PAGE) as store:
            with pytest.raises(ConfigError, match="'a' has no expert 8 in layer 0"):
                await store.load_model("a", packs["a"], limits=ModelLimits(pins=("0:8",)))
            assert not store.models


class TestAdmission:
    async def test_names_every_term(self, packs: dict[str, Path]) -> None:
        limits = {"a": ModelLimits(min_bytes=5 * PAGE, pins=("0:0-1",))}
        async with storing(only(packs, "a", "b"), 12 * PAGE, limits) as store:
            worker = Worker(store, "b")
            await store.records.pin(worker.session, [0])
            with pytest.raises(CapacityError) as caught:
                await store.load_model("large", packs["large"], limits=ModelLimits(pins=("0:0",)))
            assert str(caught.value) == (
                "the RAM budget of 48.0 KiB is too small for 'large': one token of 'large' uses "
                "24.0 KiB of experts; 12.0 KiB pinned of 'large'; 20.0 KiB, the minimum of 'a'; "
                "8.0 KiB pinned of 'a'; one token of 'b' uses 8.0 KiB of experts; 4.0 KiB pinned "
                "of 'b', in all 76.0 KiB; give --ram 76KiB or more (all experts of 'large': "
                "192.0 KiB), or lower a minimum, unpin or unload."
            )
            assert (caught.value.requested, caught.value.available) == (19 * PAGE, 12 * PAGE)

    async def test_what_is_advised_is_accepted(self, packs: dict[str, Path]) -> None:
        """Typed back as it is printed, and rounded up as that is."""
        limits = {
            "a": ModelLimits(min_bytes=9 * PAGE - 1),
            "large": ModelLimits(min_bytes=13 * PAGE + 1),
        }
        with pytest.raises(CapacityError) as caught:
            async with storing(only(packs, "a", "large"), 14 * PAGE, limits):
                pass
        ram = _advised(caught.value, "--ram")
        async with storing(only(packs, "a", "large"), ram, limits) as store:
            with pytest.raises(CapacityError) as caught:
                await store.set_limits("large", 0, 5 * PAGE)
            await store.set_limits("large", 0, _advised(caught.value, "--max"))
            with pytest.raises(ConfigError) as refused:
                await store.set_limits("a", 17 * PAGE, None)
            await store.set_limits("a", _advised(refused.value, "--min", "less"), None)

    async def test_of_a_minimum_that_no_model_can_have(self, packs: dict[str, Path]) -> None:
        says = (
            r"the minimum of 'a' is 100\.0 GiB, and all its experts together take 64\.0 KiB "
            r"\(the RAM budget is 128\.0 KiB\); give --min 64KiB or less\."
        )
        huge = ModelLimits(min_bytes=100 << 30)
        async with storing(only(packs, "a"), 32 * PAGE) as store:
            with pytest.raises(ConfigError, match=says):
                await store.set_limits("a", huge.min_bytes, None)
            assert store.models["a"].limits == ModelLimits()
            await store.unload_model("a")
            with pytest.raises(ConfigError, match=says):
                await store.load_model("a", packs["a"], limits=huge)
            assert not store.models
            await store.load_model("a", packs["a"], limits=ModelLimits(min_bytes=16 * PAGE))

    async def test_of_other_limits(self, packs: dict[str, Path]) -> None:
        async with storing(only(packs, "a", "b"), 12 * PAGE) as store:
            with pytest.raises(CapacityError, match="the minimum of 'a'"):
                await store.set_limits("a", 11 * PAGE, None)
            with pytest.raises(ConfigError, match="must not exceed"):
                await store.set_limits("a", 5 * PAGE, 4 * PAGE)
            with pytest.raises(CapacityError, match="one token uses"):
                await store.set_limits("a", 0, PAGE)
            await store.set_limits("a", 10 * PAGE, None)
            with pytest.raises(CapacityError, match="give --ram"):
                await store.set_limits("b", 3 * PAGE, None)


def _advised(error: Exception, option: str, bound: str = "more") -> int:
    """The size that a message says to give."""
    found = re.search(rf"give {option} (\S+) or {bound}\b", str(error))
    assert found is not None, error
    return parse_bytes(found[1])


async def test_the_room_follows_the_heat(packs: dict[str, Path]) -> None:
    """Load moves from one model to the other; what the first keeps is its minimum."""
    draw = random.Random(3)
    limits = {"a": ModelLimits(min_bytes=3 * PAGE)}
    async with storing(only(packs, "a", "b"), 16 * PAGE, limits) as store:
        workers = {name: Worker(store, name) for name in "ab"}

        async def work(name: str, other: str) -> tuple[int, int]:
            """Nine steps of one, for each of the other."""
            for step in range(200):
                worker = workers[other if step % 10 == 9 else name]
                count = 1 if step % 10 == 9 else 4
                await use(worker, *draw.sample(range(12), count))
            assert_consistent(store)
            return workers["a"].model.num_resident, workers["b"].model.num_resident

        first = await work("a", "b")
        assert first[0] > first[1], first
        then = await work("b", "a")
        assert then[1] > then[0] >= 3, then
        for _ in range(40):
            await use(workers["b"], *draw.sample(range(16), 6))
        assert workers["a"].model.num_resident == 3
        assert_nothing_held(store)


def _check_sum(store: Store) -> None:
    used = sum(model.arena_bytes for model in store.models.values())
    assert used + store.slots.extents.bytes_free == store.budget.num_bytes


@pytest.mark.parametrize("seed", range(5))
async def test_random_limits_hold_and_what_fits_is_accepted(
    packs: dict[str, Path], seed: int
) -> None:
    draw = random.Random(seed)
    async with storing(packs, 30 * PAGE) as store:
        workers = {name: Worker(store, name) for name in packs}
        for _ in range(150):
            name = draw.choice(list(packs))
            worker = workers[name]
            model, session = worker.model, worker.session
            if draw.random() < 0.15:
                smallest = draw.choice((0, 2, 5, 6)) * PAGE
                largest = draw.choice((None, 9 * PAGE, 12 * PAGE))
                try:
                    await store.set_limits(name, smallest, largest)
                except CapacityError as error:
                    assert error.requested > error.available  # noqa: PT017
            elif draw.random() < 0.15:
                session.unpin(session.pins.copy())
                count = draw.randint(1, 3)
                try:
                    await store.records.pin(session, draw.sample(range(16), count))
                except CapacityError as error:
                    assert error.requested > error.available  # noqa: PT017
            before = {each: each.resident_bytes for each in store.models.values()}
            most = min(16 - len(session.pins), store.budget.max_fetch_records(model))
            assert most * model.max_record_bytes >= model.manifest.working_set_bytes
            free = [entry for entry in range(16) if entry not in session.pins]
            await asyncio.wait_for(
                worker.fetch(*draw.sample(free, draw.randint(1, most))), HANG_SECONDS
            )
            worker.release()
            await until(lambda: not any(each.loads for each in store.models.values()))
            for each, num_bytes in before.items():
                if each is not model:
                    assert each.resident_bytes >= min(num_bytes, each.limits.min_bytes)
                if each.limits.max_bytes is not None:
                    assert each.resident_bytes <= each.limits.max_bytes
            assert_consistent(store)
            _check_sum(store)

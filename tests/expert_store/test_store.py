"""Several models under one budget, and their coming and going."""

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest

from expertd.settings.disk_io import DiskIo
from expertd.store import Store
from expertd_testing.handmade import PAGE, make_pack, record
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import (
    CapacityError,
    IncarnationError,
    NotFoundError,
    PackError,
    PreconditionError,
    UnauthenticatedError,
)
from expertstore.shared.handshake import Role
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
    """Records of one, two and three pages; a token uses one, two and two of them."""
    path = tmp_path_factory.mktemp("store")
    return {
        "one": make_pack(path / "one", layers=1, experts_per_token=1, record_bytes=PAGE),
        "two": make_pack(path / "two", layers=2, experts_per_token=1, record_bytes=2 * PAGE),
        "three": make_pack(path / "three", layers=1, experts_per_token=2, record_bytes=3 * PAGE),
    }


async def test_models_take_room_from_each_other(packs: dict[str, Path]) -> None:
    async with storing(packs, 16 * PAGE) as store:
        workers = {name: Worker(store, name) for name in packs}
        for _ in range(3):
            await workers["one"].fetch_and_release(*range(8))
            await workers["two"].fetch_and_release(*range(8))
            await workers["three"].fetch_and_release(*range(5))
        assert_nothing_held(store)
        assert store.models["three"].num_resident == 5


async def test_what_a_fetch_holds_itself_moves_out_of_its_way(packs: dict[str, Path]) -> None:
    models = {name: packs[name] for name in ("one", "two")}
    async with storing(models, 6 * PAGE) as store:
        small, large = Worker(store, "one"), Worker(store, "two")
        await small.fetch_and_release(0)
        await large.fetch_and_release(0)
        moved = large.directory.word(0)
        # sLL...: the two others need four pages, and beside the small one that stays are three.
        assert await asyncio.wait_for(large.fetch(0, 1, 2), HANG_SECONDS) == 2
        assert all(large.read(entry) for entry in (0, 1, 2))
        assert large.directory.word(0) != moved
        large.release()
        assert_nothing_held(store)


async def test_pinned_records_move_where_they_leave_no_gap(packs: dict[str, Path]) -> None:
    models = {name: packs[name] for name in ("one", "two")}
    async with storing(models, 7 * PAGE) as store:
        small, large = Worker(store, "one"), Worker(store, "two")
        await small.fetch_and_release(0, 1, 2, 3, 4, 5)
        await store.records.pin(small.session, [1, 3])  # .p.p...
        reads = len(disk(small.model).offsets)
        assert store.budget.max_fetch_records(large.model) == 2
        assert await large.fetch(0, 1) == 2
        assert_consistent(store)
        assert small.model.counters.moves == 1
        assert small.model.is_resident(1)
        assert small.model.is_resident(3)
        assert len(disk(small.model).offsets) == reads, "it was copied, not read again"


async def test_an_idle_model_cools_while_another_works(packs: dict[str, Path]) -> None:
    models = {name: packs[name] for name in ("one", "two")}
    async with storing(models, 16 * PAGE) as store:
        idle, busy = Worker(store, "one"), Worker(store, "two")
        await idle.fetch_and_release(*range(8))
        idle.page.touch(list(range(8)) * 100)
        store.slots.refresh()
        hot = idle.model.heat.of(idle.model.evictable()).min()
        busy.page.touch([0, 8] * 64)  # 64 tokens: eight half-lives
        store.slots.refresh()
        assert idle.model.heat.of(idle.model.evictable()).max() == pytest.approx(hot / 2**8)
        await busy.fetch_and_release(*range(8))
        assert busy.model.num_resident == 8


async def test_budgets_are_checked_at_the_door(packs: dict[str, Path], tmp_path: Path) -> None:
    async with storing({"one": packs["one"]}, 4 * PAGE) as store:
        with pytest.raises(
            CapacityError, match=r"'three' uses 24\.0 KiB.*'one' uses 4\.0 KiB.*in all 28"
        ) as caught:
            await store.load_model("three", packs["three"])
        assert caught.value.requested == 7 * PAGE
        with pytest.raises(PreconditionError, match="'one' is loaded already"):
            await store.load_model("one", packs["one"])
        with pytest.raises(PackError, match="not a pack"):
            await store.load_model("none", tmp_path)
        with pytest.raises(NotFoundError, match="loaded are: one"):
            store.model("three")
        assert list(store.models) == ["one"]


class TestUnload:
    async def test_gives_the_room_back(self, packs: dict[str, Path]) -> None:
        async with storing(packs, 16 * PAGE) as store:
            worker = Worker(store, "two")
            await worker.fetch_and_release(*range(8))
            await store.records.pin(worker.session, [0])
            assert await store.unload_model("two") == 16 * PAGE
            assert worker.closed
            assert worker.session.closed
            assert store.slots.extents.bytes_used == 0
            with pytest.raises(NotFoundError):
                store.attach(Role.WORKER, "two", worker, 1, 0)
            await store.load_model("two", packs["two"])
            assert await Worker(store, "two").fetch(0) == 1

    async def test_gives_the_page_cache_back(self, packs: dict[str, Path]) -> None:
        """Of a model that is read by mmap as it was loaded, and of no other."""
        async with storing({"one": packs["one"]}, 16 * PAGE, disk_io=DiskIo.MMAP) as store:
            await store.load_model("two", packs["two"], disk_io=DiskIo.MMAP)
            await store.load_model("three", packs["three"], disk_io=DiskIo.DIRECT)
            for name in ("one", "two", "three"):
                worker = Worker(store, name)
                await worker.fetch_and_release(0, 1, 4)
                assert worker.read(4) == record(
                    *worker.model.expert(4), worker.model.record_bytes(4)
                )
            sizes = {
                name: store.page_cache.bytes_of(model.files) for name, model in store.models.items()
            }
            assert sizes == {"one": 3 * PAGE, "two": 6 * PAGE, "three": 0}
            file, dropped = disk(store.models["two"]), []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(file, "forget", lambda *place: dropped.append(place))
                await store.unload_model("two")
            assert sum(num_bytes for _, num_bytes in dropped) == 6 * PAGE
            assert store.page_cache.num_bytes == 3 * PAGE
            file = disk(store.models["one"])
        assert file.fd == -1
        assert store.page_cache.num_bytes == 0

    async def test_waits_for_a_lease(self, packs: dict[str, Path]) -> None:
        async with storing(packs, 16 * PAGE) as store:
            worker = Worker(store, "two")
            await worker.fetch(0)
            worker.holding = True
            page = worker.page
            unload = asyncio.create_task(store.unload_model("two"))
            await asyncio.sleep(0.03)
            assert not unload.done()
            assert not page.revoked
            with pytest.raises(PreconditionError, match="being unloaded"):
                await worker.fetch(1)
            with pytest.raises(PreconditionError, match="being unloaded"):
                Worker(store, "two")
            with pytest.raises(PreconditionError, match="being unloaded already"):
                await store.unload_model("two")
            worker.holding = False
            worker.release()
            await unload

    async def test_cuts_off_who_does_not_let_go(self, packs: dict[str, Path]) -> None:
        async with storing(packs, 16 * PAGE, stall_seconds=0.1) as store:
            worker = Worker(store, "two")
            await worker.fetch(0)
            worker.holding = True
            page = worker.page
            await store.unload_model("two")
            assert page.revoked
            assert worker.closed

    async def test_does_not_keep_other_models_waiting(self, packs: dict[str, Path]) -> None:
        async with storing(packs, 16 * PAGE) as store:
            slow, other = Worker(store, "two"), Worker(store, "one")
            await slow.fetch(0)
            slow.holding = True
            unload = asyncio.create_task(store.unload_model("two"))
            await asyncio.sleep(0.01)
            assert await asyncio.wait_for(other.fetch(0), HANG_SECONDS) == 1
            slow.holding = False
            slow.release()
            await unload

    async def test_drops_hints(self, packs: dict[str, Path]) -> None:
        async with storing(packs, 16 * PAGE) as store:
            worker = Worker(store, "two")
            file = disk(worker.model)
            file.faults.gate.clear()
            store.records.prefetch(worker.session, list(range(6)), 0)
            await until(lambda: len(file.offsets) == 1)
            unload = asyncio.create_task(store.unload_model("two"))
            await asyncio.sleep(0.01)
            assert not unload.done()
            file.faults.gate.set()
            await unload
            assert len(file.offsets) == 1
            assert store.slots.extents.bytes_used == 0

    async def test_waits_for_a_read_that_nobody_wants_any_more(
        self, packs: dict[str, Path]
    ) -> None:
        async with storing(packs, 16 * PAGE) as store:
            model = store.models["two"]
            file = disk(model)
            file.faults.gate.clear()
            read = asyncio.create_task(store.records.read(model, 9))
            await until(lambda: file.offsets)
            read.cancel()  # its thread reads on all the same
            unload = asyncio.create_task(store.unload_model("two"))
            await asyncio.sleep(0.03)
            assert file.fd >= 0
            file.faults.gate.set()
            await unload
            assert file.fd < 0
            with pytest.raises(PreconditionError, match="being unloaded"):
                await store.records.read(model, 9)

    async def test_goes_on_without_its_caller(self, packs: dict[str, Path]) -> None:
        async with storing(packs, 16 * PAGE) as store:
            worker = Worker(store, "two")
            await worker.fetch(0)
            worker.holding = True
            unload = asyncio.create_task(store.unload_model("two"))
            await asyncio.sleep(0.01)
            unload.cancel()
            worker.holding = False
            worker.release()
            await until(lambda: "two" not in store.models)

    async def test_grants_who_had_begun_and_refuses_who_queued(
        self, packs: dict[str, Path]
    ) -> None:
        async with storing(packs, 16 * PAGE) as store:
            holder, first, second = (Worker(store, "two") for _ in range(3))
            await holder.fetch(*range(8))
            begun = asyncio.create_task(first.fetch(8))
            queued = asyncio.create_task(second.fetch(9))
            await asyncio.sleep(0.01)
            unload = asyncio.create_task(store.unload_model("two"))
            await asyncio.sleep(0.01)
            holder.release()
            assert await begun == 1
            with pytest.raises(PreconditionError, match="being unloaded"):
                await queued
            first.release()
            await unload


@pytest.mark.parametrize("seed", range(4))
async def test_records_of_all_sizes_by_everybody_at_once(packs: dict[str, Path], seed: int) -> None:
    """Little room in odd pieces, pins and hints in between: right bytes, and nobody starves."""
    draw = random.Random(seed)
    sizes = {"one": PAGE, "two": 2 * PAGE, "three": 3 * PAGE}

    async def work(store: Store, name: str) -> None:
        worker = Worker(store, name)
        for _ in range(60):
            most = min(store.budget.max_fetch_records(worker.model), worker.model.num_entries)
            entries = draw.sample(range(worker.model.num_entries), draw.randint(1, max(1, most)))
            with suppress(CapacityError):  # another has pinned since
                await worker.fetch(*entries)
                worker.holding = True
                await asyncio.sleep(draw.random() / 1000)
                for entry in entries:
                    assert worker.read(entry) == record(*divmod(entry, 8), sizes[name])
            worker.holding = False
            worker.release()
            chance = draw.random()
            if chance < 0.2:
                store.records.prefetch(worker.session, draw.sample(range(8), 3), 0)
            elif chance < 0.3:
                with suppress(CapacityError):
                    await store.records.pin(worker.session, draw.sample(range(8), 1))
            elif chance < 0.5:
                worker.session.unpin(worker.session.pins.copy())
        store.detach(worker.session)

    async with storing(packs, 14 * PAGE, fetch_seconds=3) as store:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for name in (*packs, *packs):
                group.create_task(work(store, name))
        await until(lambda: not any(model.loads for model in store.models.values()))
        assert_nothing_held(store)


async def test_closing_in_the_middle_of_everything(packs: dict[str, Path]) -> None:
    async with storing(packs, 16 * PAGE) as store:
        holder, other = Worker(store, "two"), Worker(store, "one")
        page = holder.page
        await holder.fetch(*range(8))
        tasks = [
            asyncio.create_task(other.fetch(0)),
            asyncio.create_task(store.unload_model("two")),
        ]
        store.records.prefetch(other.session, [1, 2], 0)
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert holder.closed
    assert not page.revoked, "nobody reuses what it still maps"


class TestSessions:
    async def test_the_limit_does_not_shut_out_the_administrator(
        self, packs: dict[str, Path]
    ) -> None:
        async with storing({"one": packs["one"]}, 4 * PAGE, max_sessions=2) as store:
            workers = [Worker(store, "one"), Worker(store, "one")]
            with pytest.raises(CapacityError, match="2 sessions"):
                Worker(store, "one")
            store.attach(Role.ADMIN, "", workers[0], 1, 0)
            assert store.models["one"].num_sessions == 2

    async def test_tokens(self, packs: dict[str, Path]) -> None:
        async with storing({"one": packs["one"]}, 4 * PAGE) as store:
            session = Worker(store, "one").session
            assert store.session(session.token, store.incarnation) is session
            with pytest.raises(IncarnationError):
                store.session(session.token + "0", "another")
            for token in ("", "wrong"):
                with pytest.raises(UnauthenticatedError):
                    store.session(token, store.incarnation)
            store.detach(session)
            with pytest.raises(UnauthenticatedError):
                store.session(session.token, store.incarnation)

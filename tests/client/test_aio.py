"""The asyncio client: what differs from the sync one."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from expertd_client import (
    CapacityError,
    DeadlineError,
    NotFoundError,
    PackError,
    PreconditionError,
    RecordLostError,
    SessionLostError,
    UnavailableError,
)
from expertd_client.aio import AsyncClient
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import num_open_files


@pytest.fixture
async def aio_store(roomy: Daemon) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(roomy.socket, timeout_seconds=10) as store:
        yield store


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await condition():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.005)


async def eventually_no_sessions(store: AsyncClient) -> None:
    async def none() -> bool:
        return not (await store.stats())["sessions"]

    await eventually(none)


async def test_acquire(aio_store: AsyncClient) -> None:
    async with await aio_store.attach("m") as session:
        with await session.acquire(1, [3, 0]) as lease:
            assert [bytes(view) for view in lease.views] == [record(1, 3), record(1, 0)]
            with pytest.raises(PreconditionError, match="release it"):
                await session.acquire(1, [3])
        with await session.acquire(1, [0]):
            pass
        assert (session.host_hits, session.nvme_misses) == (1, 2)
        with pytest.raises(NotFoundError):
            await session.acquire(7, [0])
    with pytest.raises(PreconditionError, match="not attached"):
        await session.acquire(1, [0])


async def test_hints_and_pins(aio_store: AsyncClient) -> None:
    async with await aio_store.attach("m") as session:
        assert await session.prefetch([(2, 0), (2, 1)]) == 2

        async def resident() -> bool:
            return not session.absent([(2, 0), (2, 1)])

        await eventually(resident)
        assert await session.pin([(2, 0)]) == 1
        assert await session.unpin() == 1


async def test_calls(aio_store: AsyncClient) -> None:
    assert [model.name for model in await aio_store.list_models()] == ["m"]
    assert (await aio_store.get_model("m")).num_experts == 24
    assert [got.data async for got in aio_store.read("m", [(0, 1), (2, 7)])] == [
        record(0, 1),
        record(2, 7),
    ]
    with pytest.raises(NotFoundError):
        await aio_store.attach("other")
    assert [layer.num_experts for layer in (await aio_store.get_heat("m")).layers] == [8, 8, 8]
    watched = aio_store.watch_stats(0.05)
    uptimes = [(await anext(watched))["uptime_seconds"] for _ in range(2)]
    await watched.aclose()
    assert uptimes[0] < uptimes[1]


async def test_load_and_unload(mortal: Daemon, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", seed=1)
    async with AsyncClient(mortal.socket) as store:
        assert (await store.load_model("n", pack)).name == "n"
        assert await store.unload_model("n") == 0
        with pytest.raises(PackError):
            await store.load_model("n", tmp_path)


async def test_waves(tight: Daemon) -> None:
    async with AsyncClient(tight.socket) as store, await store.attach("m") as session:
        sizes = []
        async for lease in session.waves(1, range(8)):
            with lease:
                sizes.append(len(lease.experts))
        assert sizes == [6, 2]
        with pytest.raises(CapacityError):
            await session.acquire(1, range(8))


async def test_cancelled_fetch_leaves_nothing(tight: Daemon) -> None:
    async with AsyncClient(tight.socket) as store:
        session, other = await store.attach("m"), await store.attach("m")
        before = (await store.stats())["cut_offs"]
        tight.signal(signal.SIGSTOP)
        task = asyncio.create_task(session.acquire(0, [0, 1, 2, 3]))
        await asyncio.sleep(0.1)
        with pytest.raises(PreconditionError, match="another thread or task"):
            await session.acquire(0, [0])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        tight.signal(signal.SIGCONT)
        (await other.acquire(1, range(6))).release()
        assert (await store.stats())["cut_offs"] == before
        with await session.acquire(0, [0]) as lease:
            assert bytes(lease.views[0]) == record(0, 0)


async def test_deadline(roomy: Daemon) -> None:
    async with AsyncClient(roomy.socket) as store, await store.attach("m") as session:
        roomy.signal(signal.SIGSTOP)
        with pytest.raises(DeadlineError):
            await session.acquire(0, [5], timeout_seconds=0.1)
        roomy.signal(signal.SIGCONT)
        (await session.acquire(0, [5])).release()


async def test_cancelled_attach_leaves_nothing(roomy: Daemon) -> None:
    async with AsyncClient(roomy.socket) as store:
        await (await store.attach("m")).detach()
        files = num_open_files()
        roomy.signal(signal.SIGSTOP)
        task = asyncio.create_task(store.attach("m"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        roomy.signal(signal.SIGCONT)
        await eventually_no_sessions(store)

        async def closed() -> bool:
            return num_open_files() <= files

        await eventually(closed)


async def test_read_given_up_halfway(aio_store: AsyncClient) -> None:
    records = aio_store.read("m", [(0, expert) for expert in range(8)])
    await anext(records)
    await records.aclose()
    await eventually_no_sessions(aio_store)


async def test_damage(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    with (pack / "experts-00000.safetensors").open("r+b") as stream:
        stream.truncate(4096 + RECORD_BYTES)
    with serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon:
        async with AsyncClient(daemon.socket) as store, await store.attach("m") as session:
            with pytest.raises(RecordLostError):
                await session.acquire(0, [1])
            (await session.acquire(0, [0])).release()


async def test_cut_off_then_reattach(tight: Daemon) -> None:
    async with AsyncClient(tight.socket) as store:
        session, other = await store.attach("m"), await store.attach("m")
        lease = await session.acquire(0, [0, 1, 2])
        (await other.acquire(1, range(6), in_arena=True)).release()
        with pytest.raises(SessionLostError):
            lease.release()
        await session.reattach(5)
        with await session.acquire(0, [0]) as lease:
            assert bytes(lease.views[0]) == record(0, 0)


async def test_restart(mortal: Daemon, pack: Path) -> None:
    async with AsyncClient(mortal.socket) as store, await store.attach("m") as session:
        (await session.acquire(0, [0])).release()
        mortal.kill()

        async def disconnected() -> bool:
            return not session.connected

        await eventually(disconnected)
        (await session.acquire(0, [0])).release()
        with pytest.raises(UnavailableError):
            await session.acquire(0, [1])
        with pytest.raises(UnavailableError, match="within"):
            await session.reattach(0.1)
        with serving({"m": pack}, ram=64 * RECORD_BYTES, socket=mortal.socket):
            await session.reattach(5)
            with await session.acquire(0, [1]) as lease:
                assert bytes(lease.views[0]) == record(0, 1)


async def test_closing_detaches_all(roomy: Daemon) -> None:
    async with AsyncClient(roomy.socket) as store:
        session = await store.attach("m")
    assert not session.connected
    with pytest.raises(PreconditionError, match="closed"):
        await store.list_models()
    await store.close()
    assert "expertd-listener" not in [thread.name for thread in threading.enumerate()]

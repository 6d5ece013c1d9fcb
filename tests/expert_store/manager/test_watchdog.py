"""The watchdog is fed only while loop and loader work."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from xxhash import xxh3_64_hexdigest

from expertd.disk.loader import Loader, ReadJob
from expertd.manager.systemd import Manager
from expertd.manager.watchdog import feed_watchdog
from expertd_testing.faulty_disk import FaultyFile
from tests.expert_store.in_memory import until

SECONDS = 0.15


class Notified:
    """A manager, and how often it has been told that we live."""

    def __init__(self, path: Path) -> None:
        self._receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.bind(str(path))
        self._receiver.setblocking(False)
        self.manager = Manager(address=str(path), watchdog_seconds=SECONDS)
        self._count = 0

    @property
    def count(self) -> int:
        while True:
            try:
                assert self._receiver.recv(100) == b"WATCHDOG=1"
            except BlockingIOError:
                return self._count
            self._count += 1

    def close(self) -> None:
        self.manager.close()
        self._receiver.close()


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[Notified]:
    notified = Notified(tmp_path / "notify")
    yield notified
    notified.close()


def test_no_watchdog_is_no_work() -> None:
    loader = Loader(1)
    asyncio.run(feed_watchdog(Manager(), loader))
    loader.close()


def test_fed_while_all_is_well(notified: Notified) -> None:
    async def live() -> None:
        loader = Loader(2)
        task = asyncio.create_task(feed_watchdog(notified.manager, loader))
        await until(lambda: notified.count >= 4)
        task.cancel()
        loader.close()

    asyncio.run(live())


def test_not_fed_while_the_loader_hangs(notified: Notified, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    file = FaultyFile(path)

    async def hang() -> None:
        loader = Loader(2)
        task = asyncio.create_task(feed_watchdog(notified.manager, loader))
        await until(lambda: notified.count >= 2)
        file.faults.gate.clear()
        for _ in range(2):
            buffer = memoryview(bytearray(4096))
            checksum = xxh3_64_hexdigest(bytes(4096))
            loader.submit(ReadJob(file, 0, buffer, checksum, lambda _: None, urgent=True))
        await until(lambda: len(file.offsets) == 2)
        await asyncio.sleep(0.02)
        hung = notified.count
        await asyncio.sleep(2 * SECONDS)
        assert notified.count == hung
        file.faults.gate.set()
        await until(lambda: notified.count >= hung + 2)
        task.cancel()
        loader.close()

    asyncio.run(hang())
    file.close()


def test_fed_ahead_of_a_long_queue(notified: Notified, tmp_path: Path) -> None:
    """Many reads are work, not a hang."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    file = FaultyFile(path)
    slow = file.read_some

    def read_slowly(target: memoryview, offset: int) -> int:
        time.sleep(0.01)
        return slow(target, offset)

    file.read_some = read_slowly  # type: ignore[method-assign]

    async def work() -> None:
        loader = Loader(1)
        for _ in range(1000):
            buffer = memoryview(bytearray(4096))
            loader.submit(ReadJob(file, 0, buffer, "", lambda _: None, urgent=True))
        task = asyncio.create_task(feed_watchdog(notified.manager, loader))
        await until(lambda: notified.count >= 3)
        assert len(file.offsets) < 1000
        task.cancel()
        loader.close()

    asyncio.run(work())
    file.close()


def test_not_fed_while_the_loop_hangs(notified: Notified) -> None:
    async def hang() -> None:
        loader = Loader(1)
        task = asyncio.create_task(feed_watchdog(notified.manager, loader))
        await until(lambda: notified.count >= 2)
        before = notified.count
        time.sleep(3 * SECONDS)  # noqa: ASYNC251 - what a bug would do
        assert notified.count == before
        task.cancel()
        loader.close()

    asyncio.run(hang())

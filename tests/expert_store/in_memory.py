"""A store without sockets: real arena, loader and packs, workers inside the test."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import expertd.disk.opening
from expertd.hosting.hosted_model import HostedModel
from expertd.hosting.hosted_session import HostedSession
from expertd.memory.arena import Arena
from expertd.settings.config import ServeConfig
from expertd.settings.disk_io import DiskIo
from expertd.settings.limits import NO_LIMITS, ModelLimits
from expertd.store import Store
from expertd_testing.faulty_disk import FaultyFile, FaultyMappedFile
from expertd_testing.handmade import PAGE, record
from expertstore.shared.directory import unpack_word
from expertstore.shared.handshake import Role


class Worker:
    """A worker, and its own attach connection. Fetches of it are numbered as they come."""

    def __init__(
        self, store: Store, model: str = "m", *, uid: int = 0, answers_nudges: bool = True
    ) -> None:
        self.store, self.answers_nudges = store, answers_nudges
        self.holding = self.closed = False
        self.num_nudges = self.num_fetches = 0
        self.session: HostedSession = store.attach(Role.WORKER, model, self, pid=1, uid=uid)
        self.session.has_called = True  # as after its first call by RPC
        self.model: HostedModel = self.session.model
        self.page, self.directory = self.session.page, self.model.directory

    def nudge(self) -> None:
        self.num_nudges += 1
        if self.answers_nudges and not self.holding:
            self.publish()

    def close(self) -> None:
        self.closed = True

    def publish(self) -> None:
        self.page.epoch = self.directory.epoch

    def release(self) -> None:
        """Ends the leases of all fetches so far, and publishes."""
        self.page.released_fetch = self.num_fetches
        self.publish()

    async def fetch(self, *entries: int) -> int:
        self.num_fetches += 1
        fetched = await self.store.records.fetch(self.session, entries, self.num_fetches)
        return fetched.num_missed

    async def fetch_and_release(self, *entries: int) -> None:
        await self.fetch(*entries)
        self.release()

    def read(self, entry: int) -> bytes | None:
        """The record where the directory says it lies."""
        location = unpack_word(self.directory.word(entry))
        if location is None:
            return None
        size = self.model.record_bytes(entry)
        return bytes(self.store.arena.view[location.offset : location.offset + size])


@asynccontextmanager
async def storing(
    models: Mapping[str, Path],
    arena_bytes: int,
    limits: Mapping[str, ModelLimits] | None = None,
    **settings: Any,
) -> AsyncIterator[Store]:
    """A store that holds ``models``; all their files are :class:`FaultyFile`."""
    values: dict[str, Any] = {
        "stall_seconds": 5.0,
        "fetch_seconds": 5.0,
        "loader_threads": 2,
        "scrub_bytes_per_second": 0,  # it holds records, and tests count holds
        "disk_io": DiskIo.DIRECT,
    }
    config = ServeConfig(Path("unused"), arena_bytes, **{**values, **settings})
    arena = Arena(arena_bytes, lock=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expertd.disk.opening, "RecordFile", FaultyFile)
        patch.setattr(expertd.disk.opening, "MappedFile", FaultyMappedFile)
        store = Store(config, arena)
        for name, path in models.items():
            await store.load_model(name, path, limits=(limits or {}).get(name, NO_LIMITS))
        files = [file for model in store.models.values() for file in model.files]
        try:
            yield store
        finally:
            for file in files:
                file.faults.gate.set()
            await store.close()
            arena.close()


def disk(model: HostedModel) -> FaultyFile:
    """The one file of a handmade pack."""
    (file,) = model.files
    assert isinstance(file, FaultyFile)
    return file


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Waits for something that other tasks or the loader's threads do."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


def assert_nothing_held(store: Store) -> None:
    """No hold, lease, pin or allocation is left but the resident records."""
    store.slots.refresh()
    for model in store.models.values():
        assert not model._holds.any(), model._holds
        assert not model.loads
    resident = sum(model.resident_bytes for model in store.models.values())
    retired = sum(model.reclaimer.bytes_retired for model in store.models.values())
    assert store.slots.extents.bytes_used == resident + retired


def assert_consistent(store: Store) -> None:
    """What holds between any two ticks of the loop; models must be of handmade packs."""
    pages: list[int] = []
    workers = [session for session in store.sessions.values() if session.is_worker]
    for model in store.models.values():
        assert model._holds.min() >= 0, "a hold was given back once too often"
        pins = [entry for worker in workers if worker.model is model for entry in worker.pins]
        assert model.pinned._counts == Counter([*model.pins, *pins])
        assert model.pinned.num_bytes == sum(map(model.record_bytes, model.pinned))
        for entry in range(model.num_entries):
            location, extent = unpack_word(model.directory.word(entry)), model.extent(entry)
            assert (location is None) == (extent is None)
            if location is not None and extent is not None:
                assert location.offset == extent.offset
                there = store.arena.view[extent.offset : extent.offset + extent.num_bytes]
                assert there == record(*model.expert(entry), extent.num_bytes)
        extents = [extent for e in range(model.num_entries) if (extent := model.placed(e))]
        extents += [extent for _, extent in model.reclaimer._retired]
        for offset, num_bytes in extents:
            pages += range(offset, offset + num_bytes, PAGE)
    assert len(pages) == len(set(pages)), "two records overlap"
    assert store.slots.extents.bytes_used == len(pages) * PAGE

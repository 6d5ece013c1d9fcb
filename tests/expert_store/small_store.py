"""A store without doors: a real arena, real packs and loader threads, sessions in memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

from expertd.arena import Arena
from expertd.config import ServeConfig
from expertd.directory import unpack_word
from expertd.faulty import FaultyFile
from expertd.handshake import Role
from expertd.hosted_model import HostedModel
from expertd.pack.manifest import read_manifest
from expertd.session import Session
from expertd.store import Store
from tests.handmade import PAGE, make_pack, record

RECORD = 2 * PAGE
"""What :func:`tests.handmade.make_pack` makes."""


class Worker:
    """The worker's side of a session. Idle, it answers a nudge by publishing its epoch."""

    def __init__(self, store: Store, model: str = "m") -> None:
        self.store = store
        self.holding = False
        self.hung_up = False
        self.num_nudges = 0
        self._fetches = 0
        self.session: Session = store.attach(Role.WORKER, model, self, pid=1, uid=0)
        self.model = self.session.model

    def nudge(self) -> None:
        self.num_nudges += 1
        if not self.holding:
            self.release()

    def close(self) -> None:
        self.hung_up = True

    async def fetch(self, *entries: int, seconds: float = 20) -> int:
        """Stops holding, fetches, holds. How many were not resident."""
        self.holding = False
        self.release()
        self._fetches += 1
        async with asyncio.timeout(seconds):
            missed = await self.store.records.fetch(self.session, entries, self._fetches)
        self.holding = True
        return missed

    def touch(self, *entries: int, missed: Iterable[int] = ()) -> None:
        self.session.page.touch(entries, frozenset(missed))

    def release(self) -> None:
        """Stops holding and publishes."""
        self.holding = False
        if not self.session.closed:
            self.session.page.epoch = self.model.directory.epoch
            self.session.page.released_fetch = self._fetches

    async def use(self, *entries: int) -> None:
        """One step: fetches, touches, releases."""
        await self.fetch(*entries)
        self.touch(*entries)
        self.release()


class SmallStore(Store):
    """Models are named; ``packs`` says with which seed and record size each was made."""

    def __init__(self, config: ServeConfig, arena: Arena, directory: Path) -> None:
        super().__init__(config, arena)
        self._directory = directory
        self._packs: dict[str, tuple[int, int]] = {}

    def add(
        self, name: str = "m", *, layers: int = 3, experts: int = 8, record_bytes: int = RECORD
    ) -> HostedModel:
        """A model whose files are :class:`FaultyFile`."""
        path, seed = self._directory / name, sum(name.encode())
        if not path.exists():
            make_pack(path, layers=layers, experts=experts, record_bytes=record_bytes, seed=seed)
        self._packs[name] = (record_bytes, seed)
        pack = read_manifest(path)
        files = [FaultyFile(path / file.name) for file in pack.manifest.files]
        model = self.models[name] = HostedModel(name, path, pack, files)
        return model

    def file(self, model: HostedModel) -> FaultyFile:
        file = model.files[0]
        assert isinstance(file, FaultyFile)
        return file

    def expected(self, model: HostedModel, entry: int) -> bytes:
        """What the record of that entry is."""
        return record(*model.expert(entry), *self._packs[model.name])

    def resident(self, model: HostedModel) -> set[int]:
        """The entries that workers can see."""
        return {e for e in range(model.num_entries) if model.directory.word(e)}

    def check(self) -> None:
        """What must hold at any moment between two ticks of the loop."""
        pages: list[int] = []
        for model in self.models.values():
            for entry in range(model.num_entries):
                location = unpack_word(model.directory.word(entry))
                extent = model.extent(entry)
                assert (location is None) == (extent is None)
                assert model._holds[entry] >= 0, f"{entry} was released once too often"
                if location is not None and extent is not None:
                    assert location.offset == extent.offset
                    start, size = extent
                    assert self.arena.view[start : start + size] == self.expected(model, entry)
            extents = [load.extent for load in model.loads.values()]
            extents += [e for i in range(model.num_entries) if (e := model.extent(i))]
            extents += [extent for _, extent in model.reclaimer._retired]
            for start, size in extents:
                pages += range(start, start + size, PAGE)
        assert len(pages) == len(set(pages)), "two records overlap"
        extents_ = self.slots.extents
        assert extents_.bytes_free + extents_.bytes_used == extents_.bytes_total
        # What a fetch has just been granted and not yet begun to read does not exist:
        # granting and beginning are one step.
        assert extents_.bytes_used == len(pages) * PAGE, "bytes are lost or used twice"

    def check_idle(self) -> None:
        """What must hold when nobody fetches and no session has leases or pins."""
        self.slots.refresh()
        self.check()
        for model in self.models.values():
            assert not model.loads
            assert not model._holds.any(), "somebody still holds"
            assert all(not s.fetches_in_flight for s in self.sessions.values())
        assert "idle" in repr(self.slots)


@contextlib.asynccontextmanager
async def small_store(
    tmp_path: Path, num_records: float, **settings: float
) -> AsyncIterator[SmallStore]:
    """A store whose arena holds ``num_records`` of 8 KiB."""
    arena = Arena(int(num_records * RECORD), lock=False)
    config = ServeConfig(socket=tmp_path, ram_bytes=arena.num_bytes, loader_threads=2)
    store = SmallStore(replace(config, **settings), arena, tmp_path)
    try:
        yield store
    finally:
        for model in store.models.values():
            store.file(model).faults.gate.set()
        await store.close()
        assert store.slots.extents.bytes_used == 0, "closing leaves bytes allocated"
        arena.close()


async def until(condition: object, seconds: float = 10) -> None:
    """Lets the loop run until ``condition()``."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions have no events
            await asyncio.sleep(0)

"""What is taken from the fd store, what is given up, and what is said of it."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.manager.inheritance import FdStore, Inheritance, take_inheritance
from expertd.manager.systemd import Manager, Passed
from expertd.memory.arena import Arena
from expertd.memory.description import Description, Origin, new_directory
from expertd.memory.extents import Extent
from expertd.memory.memfd import SharedMemory
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.watching import num_files
from expertstore.pack.manifest import read_manifest
from expertstore.shared.arena_trailer import NOBODY, TRAILER_BYTES, ArenaTrailer

RAM = 16 * PAGE
NUM_ENTRIES = 24


class Store:
    """A manager whose fd store is full of what a test puts there."""

    def __init__(self, path: Path) -> None:
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(path))
        self._notify.settimeout(0)
        self._address = str(path)
        self.passed: list[Passed] = []
        self.memories: list[SharedMemory] = []

    def put(self, name: str, memory: SharedMemory) -> None:
        self.memories.append(memory)
        self.passed.append(Passed(name, os.dup(memory.fd)))

    def put_arena(self, num_bytes: int = RAM) -> ArenaTrailer:
        memory = SharedMemory("expertd-arena", num_bytes + TRAILER_BYTES, 0o400)
        self.put("arena", memory)
        memory.view[:num_bytes] = b"x" * num_bytes
        return ArenaTrailer.format(memory.view[num_bytes:].cast("Q"))

    def put_directory(self, name: str, arena: int, *, model: str = "m", **more: str) -> None:
        values = {"pack": "/p", "fingerprint": "f", "origin": Origin.CONFIG, **more}
        description = Description(name=model, arena=arena, **values)  # type: ignore[arg-type]
        self.put(name, new_directory(NUM_ENTRIES, description))

    def take(self, ram: int = RAM) -> tuple[Inheritance, FdStore]:
        manager = Manager(address=self._address, descriptors=self.passed)
        store = FdStore(manager)
        found = asyncio.run(take_inheritance(manager, store, ram))
        manager.close()
        return found, store

    @property
    def told(self) -> list[str]:
        """What the daemon said since this was last asked, barriers apart."""
        messages = []
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._notify, 4096, 4)
            except BlockingIOError:
                return messages
            for fd in descriptors:
                os.close(fd)
            if data != b"BARRIER=1":
                messages.append(data.decode().replace("\n", " "))

    def close(self) -> None:
        self._notify.close()
        for memory in self.memories:
            memory.close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(
        "expertd.manager.systemd._DELIVERY_SECONDS", 0.05
    )  # nobody answers barriers
    files = num_files(os.getpid())
    store = Store(tmp_path / "notify")
    yield store
    store.close()
    assert num_files(os.getpid()) <= files


def close(found: Inheritance) -> None:
    for model in found.models.values():
        model.memory.close()
    if found.arena is not None:
        found.arena.close()


def test_nothing_was_left(store: Store) -> None:
    found, fd_store = store.take()
    assert (found.arena, found.models, store.told) == (None, {}, [])
    assert not fd_store.is_full


def test_all_is_well(store: Store) -> None:
    arena = store.put_arena()
    store.put_directory("directory-0", arena.id)
    store.put_directory("directory-3", arena.id, model="n", origin=Origin.ADMIN)
    found, fd_store = store.take()
    assert found.arena is not None
    assert sorted(found.models) == ["m", "n"]
    assert [each.name for each in found.of_admins()] == ["n"]
    assert store.told == []
    # Names that are taken are not given again.
    assert asyncio.run(fd_store.put_directory(store.memories[0])) == "directory-1"
    close(found)


def test_an_arena_of_another_size_is_emptied(store: Store) -> None:
    trailer = store.put_arena(2 * RAM)
    store.put_directory("directory-0", trailer.id)
    found, _ = store.take()
    assert (found.arena, found.models) == (None, {})
    assert trailer.reused_by == NOBODY
    assert not any(store.memories[0].view[: 2 * RAM])
    assert store.told == [
        "FDSTOREREMOVE=1 FDNAME=arena",
        "FDSTOREREMOVE=1 FDNAME=directory-0",
    ]


def test_of_two_arenas_one_is_kept(store: Store) -> None:
    first, second = store.put_arena(), store.put_arena()
    store.put_directory("directory-0", second.id)
    store.put_directory("directory-1", first.id, model="n")
    found, _ = store.take()
    assert list(found.models) == ["n"]
    assert (first.reused_by, second.reused_by) == (0, NOBODY)
    assert store.told == [
        "FDSTOREREMOVE=1 FDNAME=arena",
        "FDSTORE=1 FDNAME=arena FDPOLL=0",
        "FDSTOREREMOVE=1 FDNAME=directory-0",
    ]
    close(found)


@pytest.mark.parametrize("what", ["unsealed", "no file", "another format", "odd size", "empty"])
def test_what_is_no_arena(store: Store, what: str) -> None:
    if what == "unsealed":
        fd = os.memfd_create("arena")
        os.ftruncate(fd, RAM + TRAILER_BYTES)
    elif what == "no file":
        fd = os.open("/dev/null", os.O_RDWR)
    else:
        size = {"another format": RAM + TRAILER_BYTES, "odd size": 100, "empty": PAGE}[what]
        memory = SharedMemory("arena", size, 0o600)
        fd = os.dup(memory.fd)
        memory.close()
    store.passed.append(Passed("arena", fd))
    found, _ = store.take()
    assert found.arena is None
    assert store.told == ["FDSTOREREMOVE=1 FDNAME=arena"]


def test_directories_that_are_not_taken(store: Store) -> None:
    arena = store.put_arena()
    store.put_directory("directory-0", arena.id)
    store.put_directory("directory-1", arena.id)  # another of the same model
    store.put_directory("directory-2", arena.id ^ 1, model="n")  # of another arena
    store.put("directory-3", SharedMemory("x", PAGE, 0o600))
    store.passed.append(Passed("directory-4", os.open("/dev/null", os.O_RDWR)))
    store.put("surprise", SharedMemory("x", PAGE, 0o600))
    found, _ = store.take()
    assert found.models["m"].stored_as == "directory-0"
    assert len(found.models) == 1
    gone = ["surprise", "directory-1", "directory-2", "directory-3", "directory-4"]
    assert store.told == [f"FDSTOREREMOVE=1 FDNAME={name}" for name in gone]
    close(found)


def test_a_claim(store: Store, tmp_path: Path) -> None:
    path = make_pack(tmp_path / "pack")
    pack = read_manifest(path)
    arena = store.put_arena()
    same = {"pack": str(path), "fingerprint": pack.fingerprint}
    store.put_directory("directory-0", arena.id, model="same", **same)
    store.put_directory("directory-1", arena.id, model="changed", pack=str(path))
    store.put_directory("directory-2", arena.id, model="moved", **{**same, "pack": "/else"})
    store.put_directory("directory-3", arena.id, model="larger", **same)
    store.memories[-1].view.cast("Q")[3] += 1
    found, fd_store = store.take()

    async def claim(name: str) -> str | None:
        claimed = await found.claim(fd_store, name, path, pack)
        if claimed is None:
            return None
        claimed.memory.close()
        return claimed.stored_as

    async def claims() -> list[str | None]:
        names = ("same", "same", "changed", "moved", "larger", "unknown")
        return [await claim(name) for name in names]

    assert asyncio.run(claims()) == ["directory-0", None, None, None, None, None]
    assert found.models == {}
    close(found)


def test_a_store_that_says_its_room() -> None:
    manager = Manager(address="@nobody-listens-here", max_stored=2)
    store = FdStore(manager)
    store.note("arena")
    assert not store.is_full
    store.note("directory-0")
    assert store.is_full
    manager.close()


def test_an_arena_that_is_taken_over_keeps_its_bytes() -> None:
    arena = Arena(RAM, lock=False)
    arena.memory.view[:5] = b"bytes"
    memory = SharedMemory.adopt(os.dup(arena.memory.fd))
    identity = arena.trailer.id
    arena.close()
    again = Arena(RAM, lock=False, memory=memory)
    assert bytes(again.view[:5]) == b"bytes"
    assert (again.trailer.id, again.trailer.adoptions, again.trailer.reused_by) == (identity, 1, 0)
    # Whoever asks for a place to write voids the sessions of the daemon before.
    again.writable(Extent(0, PAGE))
    assert again.trailer.reused_by == 1
    again.close()

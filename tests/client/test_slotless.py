"""Records that the arena has no slot for are read from the pack, and are the same bytes."""

import asyncio
import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from expertd_client import (
    Client,
    DeadlineError,
    Lease,
    PackWarning,
    RecordLostError,
    Session,
    UnavailableError,
)
from expertd_client.aio import AsyncClient
from expertd_client.annex import PackFiles, PackPlace, PackUnreadableError
from expertd_client.arena_mapping import ArenaMapping
from expertd_client.mapping import HoldState, Mapping
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from expertstore.shared.directory import ABSENT
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import eventually
from tests.client.shared_memory import PAGE, SharedMemory

ROOM = 10  # records, of which one token's six cannot be pinned


@pytest.fixture(scope="module")
def full(pack: Path) -> Iterator[Daemon]:
    with serving({"m": pack}, ram=ROOM * RECORD_BYTES) as daemon:
        yield daemon


@contextmanager
def all_pinned_or_leased(daemon: Daemon) -> Iterator[tuple[Session, Lease]]:
    """A session for which there is no slot, and the lease that has the last ones."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        store = stack.enter_context(Client(daemon.socket))
        pinner, holder = (stack.enter_context(store.attach("m")) for _ in range(2))
        assert pinner.pin([(0, expert) for expert in range(4)]) == 4
        lease = holder.acquire(1, range(6))
        session = stack.enter_context(store.attach("m"))
        yield session, lease
        lease.release()


def read(lease: Lease) -> list[bytes]:
    return [bytes(view) for view in lease.views]


def test_what_has_no_slot_is_read_from_the_pack(full: Daemon) -> None:
    with all_pinned_or_leased(full) as (session, held):
        for layer in (0, 1, 2):
            with session.acquire(layer, range(2, 8)) as lease:
                assert read(lease) == [record(layer, expert) for expert in range(2, 8)]
                assert all(view.readonly for view in lease.views)
                assert max(lease.offsets) + RECORD_BYTES <= session.mapped_bytes
        with session.acquire(0, [3, 7]) as lease:
            in_arena, copied = lease.offsets
            assert in_arena < session.arena_bytes <= copied, "what is resident is used from there"
        assert (session.pack_reads, session.nvme_misses, session.host_hits) == (13, 13, 7)
        for lease in session.waves(2, range(8)):
            with lease:
                assert read(lease) == [record(2, expert) for expert in lease.experts]
        with Client(full.socket) as store:
            stats = store.stats()
        assert stats["models"][0]["records_in_pack"] >= session.pack_reads
        (told,) = (each for each in stats["sessions"] if each["id"] == session.id)
        assert told["records_in_pack"] == session.pack_reads
        held.release()
        with session.acquire(2, range(6)) as lease:
            assert max(lease.offsets) < session.arena_bytes
        assert session.pack_reads == told["records_in_pack"]


def test_the_same_for_asyncio(full: Daemon) -> None:
    async def work() -> None:
        async with AsyncClient(full.socket) as store, await store.attach("m") as session:
            with await session.acquire(2, range(6)) as lease:
                assert read(lease) == [record(2, expert) for expert in range(6)]
            async for lease in session.waves(0, range(8)):
                with lease:
                    assert read(lease) == [record(0, expert) for expert in lease.experts]
            assert session.pack_reads == 10

    with all_pinned_or_leased(full):
        asyncio.run(work())


async def test_a_cancelled_reader_writes_nothing_later(
    full: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread would write where the next fetch's records have come to lie."""
    loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    read_file = PackFiles.read

    def slow(files: PackFiles, place: PackPlace, target: memoryview) -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        read_file(files, place, target)

    with all_pinned_or_leased(full):
        async with AsyncClient(full.socket) as store, await store.attach("m") as session:
            monkeypatch.setattr(PackFiles, "read", slow)
            task = asyncio.create_task(session.acquire(2, [0, 1]))
            await begun.wait()
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=0.05)
            assert not done, "its thread still reads"
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            with await session.acquire(2, [4, 5]) as lease:
                assert read(lease) == [record(2, 4), record(2, 5)]


@pytest.mark.parametrize("why", ["no permission", "not there", "another pack"])
def test_who_cannot_read_the_pack_says_so_once_and_waits(
    full: Daemon, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with all_pinned_or_leased(full) as (session, held):
        if why == "no permission":
            monkeypatch.setattr("expertd_client.annex.open_regular", refuse)
        elif why == "not there":
            session.pack_path = tmp_path
        else:
            session.pack_path = make_pack(tmp_path / "other", seed=1)
        with pytest.warns(PackWarning, match="waits for slots"), pytest.raises(DeadlineError):
            session.acquire(2, [0, 1], timeout_seconds=0.3)
        held.release()
        with session.acquire(2, [0, 1]) as lease:
            assert read(lease) == [record(2, 0), record(2, 1)]
        assert session.pack_reads == 0


def test_a_file_that_is_truncated_or_overwritten_while_its_record_is_used(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    (file,) = pack.glob("experts-*")
    with (
        serving({"m": pack}, ram=ROOM * RECORD_BYTES) as daemon,
        all_pinned_or_leased(daemon) as (session, held),
    ):
        with session.acquire(2, range(2, 8)) as lease:
            with file.open("r+b") as writable:
                writable.seek(-3 * RECORD_BYTES, os.SEEK_END)
                writable.write(bytes(RECORD_BYTES))
            os.truncate(file, file.stat().st_size - RECORD_BYTES)
            assert read(lease) == [record(2, expert) for expert in range(2, 8)]
        with session.acquire(2, [4]) as lease:
            assert read(lease) == [record(2, 4)]
        with pytest.warns(PackWarning, match="truncated"), pytest.raises(DeadlineError):
            session.acquire(2, [7], timeout_seconds=0.3)
        held.release()
        # The daemon says which record is lost: by name, and no other.
        with pytest.raises(RecordLostError, match="layer 2 expert 7"):
            session.acquire(2, [7])
        with session.acquire(2, [4, 6]) as lease:
            assert read(lease) == [record(2, 4), record(2, 6)]


def test_a_restart_between_the_answer_and_the_reading(pack: Path) -> None:
    """What the dead daemon has said of the pack still holds; the next fetch finds it gone."""
    with serving({"m": pack}, ram=ROOM * RECORD_BYTES) as daemon, ExitStack() as stack:
        session, _ = stack.enter_context(all_pinned_or_leased(daemon))
        read_file = session._pack.read

        def read_later(place: PackPlace, target: memoryview) -> None:
            daemon.kill()
            read_file(place, target)

        session._pack.read = read_later  # type: ignore[method-assign]
        with session.acquire(2, [0, 5]) as lease:
            eventually(lambda: not session.connected)
            assert read(lease) == [record(2, 0), record(2, 5)]
        with pytest.raises(UnavailableError):
            session.acquire(2, [0])
        with serving({"m": pack}, ram=ROOM * RECORD_BYTES, socket=daemon.socket):
            session.reattach(10)
            with session.acquire(2, range(6)) as lease:
                assert read(lease) == [record(2, expert) for expert in range(6)]
            assert session.pack_reads == 2


def test_more_than_a_worker_has_memory_for_is_read_in_waves(full: Daemon) -> None:
    with all_pinned_or_leased(full) as (session, _):
        session._mapping.annex_bytes = 2 * RECORD_BYTES  # type: ignore[union-attr]
        sizes = []
        for lease in session.waves(2, range(5)):
            with lease:
                sizes.append(len(lease.experts))
                assert read(lease) == [record(2, expert) for expert in lease.experts]
        assert sizes == [2, 2, 1]
        with pytest.raises(DeadlineError):
            session.acquire(2, range(5), timeout_seconds=0.3)


def test_who_needs_them_in_the_arena_waits(full: Daemon) -> None:
    with all_pinned_or_leased(full) as (session, _), pytest.raises(DeadlineError):
        next(session.waves(2, [0], in_arena=True, timeout_seconds=0.3))


def test_files_are_opened_once_and_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    place = PackPlace(1, "file", 0, xxh3_64_intdigest(b"x" * PAGE))
    files = PackFiles(tmp_path)
    for _ in range(2):
        files.read(place, memoryview(bytearray(PAGE)))
        assert num_open(tmp_path / "file") == 1
    del files
    assert num_open(tmp_path / "file") == 0


def num_open(file: Path) -> int:
    """How many of this process's descriptors are of ``file``."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it has been closed meanwhile
            found += descriptor.readlink() == file.resolve()
    return found


def test_copies_are_there_until_the_release(shared: SharedMemory) -> None:
    mapping = Mapping.map(shared.descriptors, adoption=0, annex_bytes=4 * PAGE, **shared.sizes)
    shared.publish(0, 3)
    mapping.begin_fetch()
    assert ABSENT in mapping.try_hold([0, 1], HoldState.FETCHING)
    assert mapping.copy(1, PAGE, lambda target: fill(target, b"1"))
    assert mapping.copy(2, 2 * PAGE, lambda target: fill(target, b"2"))
    assert not mapping.copy(3, 2 * PAGE, lambda target: fill(target, b"3")), "it is full"
    words = mapping.try_hold([0, 1, 2], HoldState.FETCHING)
    offsets = [((word & 0xFFFF_FFFF) - 1) * PAGE for word in words]
    assert offsets[0] == 3 * PAGE
    assert bytes(mapping.arena[offsets[1] :][:PAGE]) == b"1" * PAGE
    assert bytes(mapping.arena[offsets[2] :][: 2 * PAGE]) == b"2" * 2 * PAGE
    assert offsets[2] + 2 * PAGE <= mapping.mapped_bytes
    mapping.release()
    assert not any(mapping.arena[offsets[1] :][: 3 * PAGE]), "its memory was given back"
    assert ABSENT in mapping.try_hold([1])


def fill(target: memoryview, byte: bytes) -> None:
    target[:] = byte * len(target)


def test_a_copy_that_fails_is_none(shared: SharedMemory, tmp_path: Path) -> None:
    mapping = Mapping.map(shared.descriptors, adoption=0, annex_bytes=4 * PAGE, **shared.sizes)
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    place = PackPlace(1, "file", 0, 123)
    mapping.begin_fetch()
    with pytest.raises(PackUnreadableError, match="is not what the daemon's is"):
        mapping.copy(1, PAGE, lambda target: PackFiles(tmp_path).read(place, target))
    with pytest.raises(PackUnreadableError, match="truncated"):
        mapping.copy(1, 2 * PAGE, lambda target: PackFiles(tmp_path).read(place, target))
    assert ABSENT in mapping.try_hold([1], HoldState.FETCHING)
    mapping.abandon_fetch()
    assert not any(mapping.arena[-4 * PAGE :]), "its memory was given back"


def test_where_addresses_are_short_there_is_no_annex(shared: SharedMemory) -> None:
    mapping = ArenaMapping(shared.descriptors[0], shared.sizes["arena_bytes"], 1 << 60)
    assert mapping.annex.num_bytes == 0
    assert len(mapping.records) == shared.sizes["arena_bytes"]


@pytest.mark.parametrize("waves", [False, True])
def test_the_directory_is_looked_at_once_before_a_fetch_and_once_after(
    roomy: Daemon, *, waves: bool
) -> None:
    with Client(roomy.socket) as store, store.attach("m") as session:
        looked: list[int] = []

        class Looking:
            def __getitem__(self, entry: int) -> int:
                looked.append(entry)
                word: int = entries[entry]
                return word

        entries = session._mapping._entries  # type: ignore[union-attr]
        absent = [e for e in range(8) if session.absent([(1, e)])][:3]
        session._mapping._entries = Looking()  # type: ignore[union-attr, assignment]
        if waves:
            for lease in session.waves(1, absent):
                lease.release()
        else:
            session.acquire(1, absent).release()
        assert session.nvme_misses == 3
        assert len(looked) == 2 * 3

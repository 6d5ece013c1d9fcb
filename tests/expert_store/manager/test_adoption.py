"""Which claims of a directory are granted: in memory, against a model of what should be."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertd.disk.record_file import RecordFile
from expertd.hosting.hosted_model import HostedModel
from expertd.manager import adoption
from expertd.manager.adoption import adopt_records
from expertd.memory.arena import Arena
from expertd.memory.description import Description, Origin, new_directory
from expertd.memory.extents import Extent, Extents
from expertd.memory.memfd import SharedMemory
from expertd_testing.handmade import PAGE, make_pack, record
from expertstore.pack.manifest import read_manifest
from expertstore.shared.directory import ABSENT, Directory, pack_word, unpack_word

RECORD = 2 * PAGE
NUM_ENTRIES = 24
ARENA_PAGES = 64


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(ARENA_PAGES * PAGE, lock=False)
    yield arena
    arena.close()


def left_directory() -> SharedMemory:
    return new_directory(
        NUM_ENTRIES,
        Description(name="m", pack="/p", fingerprint="f", arena=1, origin=Origin.CONFIG),
    )


def take_over(pack: Path, arena: Arena, memory: SharedMemory) -> tuple[HostedModel, Extents]:
    manifest = read_manifest(pack)
    files = [RecordFile(pack / file.name, direct=False) for file in manifest.manifest.files]
    model = HostedModel("m", pack, manifest, files, memory)
    extents = Extents(arena.num_bytes)
    asyncio.run(adopt_records(model, arena, extents))
    return model, extents


def write(arena: Arena, entry: int, page: int) -> None:
    """Puts the entry's record there, over whatever was."""
    arena.writable(Extent(page * PAGE, RECORD))[:] = record(*divmod(entry, 8))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    written=st.lists(
        st.tuples(st.integers(0, NUM_ENTRIES - 1), st.integers(0, ARENA_PAGES - 2)), max_size=30
    ),
    claimed=st.dictionaries(
        st.integers(0, NUM_ENTRIES - 1), st.integers(0, ARENA_PAGES + 3), max_size=24
    ),
    flipped=st.lists(st.integers(0, ARENA_PAGES * PAGE - 1), max_size=3),
)
def test_what_is_granted_is_sound_and_alone(
    pack: Path,
    arena: Arena,
    written: list[tuple[int, int]],
    claimed: dict[int, int],
    flipped: list[int],
) -> None:
    """However a directory contradicts the arena: records that are there and claimed are kept."""
    arena.memory.view[: arena.num_bytes] = bytes(arena.num_bytes)
    truth = dict(claimed)
    for entry, page in written:
        write(arena, entry, page)
        truth.setdefault(entry, page)  # most claims are right
    for offset in flipped:
        arena.memory.view[offset] ^= 1
    memory = left_directory()
    directory = Directory(memory.view.cast("Q"))
    for entry, page in truth.items():
        directory.publish(entry, pack_word(page * PAGE, 3))
    epoch = directory.epoch
    sound = {
        entry: page
        for entry, page in truth.items()
        if page <= ARENA_PAGES - 2
        and arena.view[page * PAGE : page * PAGE + RECORD] == record(*divmod(entry, 8))
    }
    model, extents = take_over(pack, arena, memory)
    kept = {
        entry: location.offset // PAGE
        for entry in range(NUM_ENTRIES)
        if (location := unpack_word(directory.word(entry))) is not None
    }
    assert kept == sound  # two sound records never overlap: their bytes differ
    assert {entry: model.extent(entry) for entry in kept} == {
        entry: Extent(page * PAGE, RECORD) for entry, page in kept.items()
    }
    assert model.num_resident == len(kept)
    assert model.places_of(model.evictable())[0].tolist() == [
        kept[entry] * PAGE for entry in sorted(kept)
    ]
    assert extents.bytes_used == len(kept) * RECORD
    assert model.counters.dropped_records == len(truth) - len(kept)
    assert model.counters.adopted_bytes == len(kept) * RECORD
    assert directory.epoch == epoch + (len(truth) > len(kept))
    model.close(extents.free)
    assert extents.bytes_free == arena.num_bytes


def test_identical_records_are_not_shared(arena: Arena, tmp_path: Path) -> None:
    """Two experts of equal bytes, and two words that lead to one place: one of them is kept."""
    path = make_pack(tmp_path / "pack")
    text = (path / "pack.json").read_text()
    checksums = [line.strip().strip('",') for line in text.splitlines() if _is_checksum(line)]
    (path / "pack.json").write_text(text.replace(checksums[1], checksums[0]))
    write(arena, 0, 4)
    memory = left_directory()
    directory = Directory(memory.view.cast("Q"))
    for entry in (0, 1):
        directory.publish(entry, pack_word(4 * PAGE, 1))
    model, extents = take_over(path, arena, memory)
    assert (model.num_resident, extents.bytes_used) == (1, RECORD)
    assert directory.word(1) == ABSENT
    del directory
    model.close(extents.free)


def _is_checksum(line: str) -> bool:
    text = line.strip().strip('",')
    return len(text) == 16 and all(letter in "0123456789abcdef" for letter in text)


def test_generations_go_on(pack: Path, arena: Arena) -> None:
    write(arena, 5, 0)
    memory = left_directory()
    directory = Directory(memory.view.cast("Q"))
    directory.publish(5, pack_word(0, 41))
    model, extents = take_over(pack, arena, memory)
    assert model._generation == 41
    del directory
    model.close(extents.free)


def test_progress_is_told(
    pack: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adoption, "_PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(adoption, "_BATCH_BYTES", RECORD)
    memory = left_directory()
    directory = Directory(memory.view.cast("Q"))
    for entry in range(4):
        write(arena, entry, 2 * entry)
        directory.publish(entry, pack_word(2 * entry * PAGE, 1))
    with caplog.at_level("INFO", "expertd"):
        model, extents = take_over(pack, arena, memory)
    assert "verifying model=m done='8.0 KiB' of='32.0 KiB'" in caplog.text
    assert "model adopted model=m records=4 bytes=32768 dropped=0" in caplog.text
    del directory
    model.close(extents.free)

"""A model's bookkeeping: entries, residency, generations, counters. No loop, no reads."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from expertd.disk.loader import ReadJob
from expertd.disk.record_file import RecordFile
from expertd.hosting.hosted_model import HostedModel, Load
from expertd.memory.description import Description, Origin, new_directory
from expertd.memory.extents import Extent, Extents
from expertd_testing.handmade import PAGE, make_pack
from expertstore.errors import NotFoundError
from expertstore.pack.manifest import Fingerprinted, read_manifest
from expertstore.shared.directory import unpack_word

RECORD = 2 * PAGE


def host(path: Path, pack: Fingerprinted) -> HostedModel:
    files = [RecordFile(path / file.name, direct=False) for file in pack.manifest.files]
    description = Description(
        name="m", pack=str(path), fingerprint=pack.fingerprint, arena=1, origin=Origin.CONFIG
    )
    memory = new_directory(pack.manifest.num_experts, description)
    return HostedModel("m", path, pack, files, memory)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[HostedModel]:
    path = make_pack(tmp_path / "pack")
    model = host(path, read_manifest(path))
    yield model
    model.close(lambda _: None)


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[HostedModel]:
    """MoE layers 1, 2 and 5, with 8, 3 and 8 experts."""
    path = make_pack(tmp_path / "sparse")
    pack = read_manifest(path)
    first, second, third = pack.manifest.layers
    short = {
        name: getattr(second, name)[:3] for name in ("files", "offsets", "checksums")
    }  # the rest of the file belongs to nobody
    layers = (
        msgspec.structs.replace(first, layer=1),
        msgspec.structs.replace(second, layer=2, num_experts=3, **short),
        msgspec.structs.replace(third, layer=5),
    )
    manifest = msgspec.structs.replace(pack.manifest, layers=layers)
    model = host(path, Fingerprinted(manifest, pack.fingerprint))
    yield model
    model.close(lambda _: None)


def load(model: HostedModel, entry: int, extent: Extent, *, hinted: bool = False) -> Load:
    """A read that is under way."""
    place = model.place(entry)
    target = memoryview(bytearray(extent.num_bytes))
    job = ReadJob(place.file, place.offset, target, place.checksum, lambda _: None, not hinted)
    loop = asyncio.new_event_loop()
    done: asyncio.Future[str | None] = loop.create_future()
    loop.close()
    model.loads[entry] = made = Load(entry, extent, hinted, done, job)
    return made


def arrive(model: HostedModel, *entries: int, hinted: bool = False) -> None:
    """Makes records resident, each where its entry says."""
    for entry in entries:
        model.arrive(load(model, entry, Extent(entry * RECORD, RECORD), hinted=hinted))


def touch(model: HostedModel, *entries: int) -> None:
    model.touched(np.array(entries, np.int64), len(entries), 0)


def test_entries_of_layers_with_gaps(sparse: HostedModel) -> None:
    assert sparse.num_entries == 19
    assert [sparse.first_entry(layer) for layer in (1, 2, 5)] == [0, 8, 11]
    entries = [(1, e) for e in range(8)] + [(2, e) for e in range(3)] + [(5, e) for e in range(8)]
    assert [sparse.entry(*expert) for expert in entries] == list(range(19))
    assert [sparse.expert(entry) for entry in range(19)] == entries
    assert sparse.touches_per_token == 6
    assert sparse.directory.num_entries == 19


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ((0, 0), "no MoE layer 0"),
        ((3, 0), "no MoE layer 3"),
        ((-1, 0), "no MoE layer -1"),
        ((2, 3), "no expert 3 in layer 2: it has 3"),
        ((5, -1), "no expert -1 in layer 5"),
    ],
)
def test_what_is_not_there_is_named(
    sparse: HostedModel, expert: tuple[int, int], message: str
) -> None:
    with pytest.raises(NotFoundError, match=message):
        sparse.entry(*expert)


def test_places_are_those_of_the_manifest(sparse: HostedModel) -> None:
    for layer in sparse.manifest.layers:
        for expert in range(layer.num_experts):
            place = sparse.place(sparse.entry(layer.layer, expert))
            assert (place.offset, place.checksum) == (
                layer.offsets[expert],
                layer.checksums[expert],
            )


def test_arriving_publishes_and_evicting_withdraws(model: HostedModel) -> None:
    made = load(model, 3, Extent(8 * PAGE, RECORD))
    assert model.placed(3) == made.extent
    assert model.extent(3) is None
    model.arrive(made)
    assert not model.loads
    assert model.extent(3) == model.placed(3) == made.extent
    location = unpack_word(model.directory.word(3))
    assert location is not None
    assert location.offset == 8 * PAGE
    assert (model.num_resident, model.resident_bytes) == (1, RECORD)
    before = model.directory.epoch
    model.evict([3])
    assert model.directory.epoch == before + 1
    assert (model.directory.word(3), model.extent(3), model.placed(3)) == (0, None, None)
    assert model.reclaimer.bytes_retired == RECORD
    assert model.reclaimer.collect([before]) == []
    assert model.reclaimer.collect([before + 1]) == [made.extent]
    assert model.counters.evictions == 1


def test_no_two_residencies_look_alike(model: HostedModel) -> None:
    words = set()
    for _ in range(3):
        for entry in (0, 1, 0):
            model.arrive(load(model, entry, Extent(0, RECORD)))
            words.add(model.directory.word(entry))
            model.evict([entry])
    assert len(words) == 9


def test_what_is_held_is_not_evictable(model: HostedModel) -> None:
    arrive(model, 0, 1, 2)
    model.hold([0, 1, 1])
    assert model.evictable().tolist() == [2]
    assert [model.num_holds(entry) for entry in (0, 1, 2)] == [1, 2, 0]
    model.unhold([0, 1])
    assert model.evictable().tolist() == [0, 2]
    model.unhold([1])
    assert model.evictable().tolist() == [0, 1, 2]


def test_several_are_evicted_in_one_epoch(model: HostedModel) -> None:
    arrive(model, *range(5))
    before = model.directory.epoch
    model.evict([0, 2, 4])
    assert model.directory.epoch == before + 1
    assert model.evictable().tolist() == [1, 3]
    assert model.counters.evictions == 3


def test_each_hinted_record_is_counted_once(model: HostedModel) -> None:
    arrive(model, 0, 1, 2, hinted=True)
    arrive(model, 3)
    touch(model, 0, 0, 3)
    touch(model, 0)
    model.evict([0, 1, 3])
    counters = model.counters
    assert (counters.prefetch_useful, counters.prefetch_wasted) == (1, 1)
    arrive(model, 1)  # on demand this time
    touch(model, 1, 2)
    model.evict([1, 2])
    assert (counters.prefetch_useful, counters.prefetch_wasted) == (2, 1)


def test_a_hinted_record_is_not_the_first_to_go(model: HostedModel) -> None:
    arrive(model, 0, hinted=True)
    arrive(model, 1, 2)
    assert model.heat.coldest(model.evictable()).tolist() == [1, 2, 0]


def test_hits_are_the_touches_that_were_no_misses(model: HostedModel) -> None:
    model.touched(np.array([1, 2], np.int64), 10, 3)  # of ten, two could be read back
    assert (model.counters.host_hits, model.counters.nvme_misses) == (7, 3)


def test_closing_gives_every_extent_back(tmp_path: Path) -> None:
    path = make_pack(tmp_path / "pack")
    model, extents = host(path, read_manifest(path)), Extents(4 * RECORD)
    for entry in range(4):
        extent = extents.allocate(RECORD)
        assert extent is not None
        model.arrive(load(model, entry, extent))
    model.evict([1, 2])
    assert model.is_in_use
    model.close(extents.free)
    assert extents.bytes_used == 0
    assert all(file.fd < 0 for file in model.files)
    assert not model.is_in_use

"""Opening a pack: in the way that is asked for, or the one that is faster."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from expertd.disk import mapped_file, opening, trial
from expertd.disk.mapped_file import MappedFile
from expertd.disk.opening import DiskChoice, OpenPack, open_pack
from expertd.disk.page_cache import PageCache
from expertd.disk.trial import NOT_TRIED, Trial
from expertd.settings.disk_io import DiskIo
from expertd_testing.handmade import make_pack
from expertstore.errors import PackError
from expertstore.pack.manifest import PackFile, read_manifest

AUTO, DIRECT, MMAP = DiskIo.AUTO, DiskIo.DIRECT, DiskIo.MMAP


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("opening") / "pack")


@contextmanager
def opened(pack: Path, asked: DiskIo, page_cache: PageCache | None = None) -> Iterator[OpenPack]:
    manifest = read_manifest(pack).manifest
    found = open_pack(pack, manifest, asked, page_cache or PageCache(1 << 30))
    yield found
    for file in found.files:
        file.close()


def descriptors() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("asked", [DIRECT, MMAP])
def test_as_it_is_asked_for(pack: Path, asked: DiskIo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(opening, "try_both")  # nothing is tried
    with opened(pack, asked) as found:
        assert [isinstance(file, MappedFile) for file in found.files] == [asked is MMAP]
        assert (found.disk.asked, found.disk.way) == (asked, asked)


@pytest.mark.parametrize(
    ("measured", "way", "text"),
    [
        (Trial(2 << 30, 1 << 30), DIRECT, "(tried: direct 2.0 GiB/s, mmap 1.0 GiB/s)"),
        (Trial(1 << 30, 5 << 30), MMAP, "read by mmap (tried: direct 1.0 GiB/s, mmap 5.0 GiB/s)"),
        (NOT_TRIED, DIRECT, "read "),
    ],
)
def test_the_faster_way_is_taken_and_the_other_closed(
    pack: Path, measured: Trial, way: DiskIo, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(direct: object, mapped: list[MappedFile], *_: object, keeps_cache: bool) -> Trial:
        assert keeps_cache
        mapped[0].read_some([memoryview(bytearray(4096))], 4096)
        return measured

    monkeypatch.setattr(opening, "try_both", tried)
    before, cache = descriptors(), PageCache(1 << 30)
    with opened(pack, AUTO, cache) as found:
        assert len(descriptors() - before) == 1
        assert (found.disk.asked, found.disk.way, found.disk.trial) == (AUTO, way, measured)
        assert [isinstance(file, MappedFile) for file in found.files] == [way is MMAP]
        assert text in str(found.disk)
        assert cache.num_bytes == (4096 if way is MMAP else 0)
    assert descriptors() == before
    assert cache.num_bytes == 0
    assert str(pack) not in Path("/proc/self/maps").read_text()


def test_a_warm_page_cache_counts_only_if_it_can_stay(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def tried(*_: object, keeps_cache: bool) -> Trial:
        asked.append(keeps_cache)
        return NOT_TRIED

    monkeypatch.setattr(opening, "try_both", tried)
    size = read_manifest(pack).manifest.expert_bytes
    for max_bytes in (size, size - 1):
        with opened(pack, AUTO, PageCache(max_bytes)):
            pass
    assert asked == [True, False]


def test_both_are_really_tried(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MAX_SECONDS", 30.0)  # on a busy machine, too
    with opened(pack, AUTO) as found:
        assert found.disk.trial.is_known
        assert found.disk.way in (DIRECT, MMAP)
        assert "tried: direct" in str(found.disk)


def test_where_it_cannot_be_mapped(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some file systems cannot, and a limit on address space forbids."""

    def refused(*_: object) -> None:
        mapped_file.ctypes.set_errno(errno.ENODEV)

    monkeypatch.setattr(mapped_file, "map_file", refused)
    before = descriptors()
    with opened(pack, AUTO) as found:
        assert found.disk.way is DIRECT
        assert "experts-00000.safetensors cannot be mapped: No such device" in found.disk.trouble
        assert len(descriptors() - before) == 1
    with pytest.raises(PackError, match='No such device; set disk_io to "direct" for this pack'):
        open_pack(pack, read_manifest(pack).manifest, MMAP, PageCache(0))
    assert descriptors() == before


@pytest.mark.parametrize(("spare", "served"), [(0, False), (1, True)])
def test_without_descriptors(pack: Path, spare: int, served: bool) -> None:
    """One is enough to read it, without a trial; of none it says so, and keeps nothing."""
    manifest, before = read_manifest(pack).manifest, descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + spare, limits[1]))
    try:
        if served:
            found = open_pack(pack, manifest, AUTO, PageCache(0))
            assert found.disk.way is DIRECT
            assert "Too many open files" in found.disk.trouble
            found.files[0].close()
        else:
            for asked in DiskIo:
                with pytest.raises(PackError, match="cannot be read: Too many open files"):
                    open_pack(pack, manifest, asked, PageCache(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert descriptors() == before


@pytest.mark.parametrize("asked", DiskIo)
def test_if_a_file_is_missing_none_stays_open(pack: Path, asked: DiskIo) -> None:
    manifest, before = read_manifest(pack).manifest, descriptors()
    files = (*manifest.files, PackFile(name="absent", num_bytes=1))
    with pytest.raises(PackError, match="absent cannot be read: No such file"):
        open_pack(pack, msgspec.structs.replace(manifest, files=files), asked, PageCache(0))
    assert descriptors() == before


def test_what_the_start_line_says() -> None:
    assert str(DiskChoice()) == "read direct"
    assert str(DiskChoice(past_page_cache=False)) == "read through the page cache"
    assert str(DiskChoice(MMAP, MMAP, past_page_cache=False)) == "read by mmap"

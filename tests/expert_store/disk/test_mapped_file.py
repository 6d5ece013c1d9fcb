"""Mapped files: whatever becomes of the file or the disk costs records, and never the process."""

import ctypes
import errno
import mmap
import os
import queue
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertd.disk import mapped_file
from expertd.disk.loader import Loader, ReadJob, read_verified
from expertd.disk.mapped_file import MappedFile
from expertd.disk.page_cache import PageCache
from expertd_testing.handmade import PAGE, make_pack, record
from expertstore.errors import PackError
from expertstore.pack.manifest import read_manifest

RECORD = 2 * PAGE
NAME = "experts-00000.safetensors"
ROOT = Path(__file__).parents[3]
CUTS = (0, 9, 9.5, 10.5)
"""Pages that are left: none, all before a record, and half of its first or its second one."""
_EHWPOISON = 133  # Python has no name for it


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """The record of expert ``i`` lies at page 1 + 2 * i."""
    path = make_pack(tmp_path / "pack", layers=1, experts=8)
    descriptor = os.open(path / NAME, os.O_RDONLY)
    os.fsync(descriptor)  # what is not yet on the disk cannot be dropped from the page cache
    os.close(descriptor)
    return path


@pytest.fixture
def file(pack: Path) -> Iterator[MappedFile]:
    file = MappedFile(pack / NAME, page_cache=PageCache(1 << 30))
    yield file
    file.close()


def read(file: MappedFile, pack: Path, expert: int) -> str | None:
    """What is wrong with a record; None if it arrived as it is in the pack."""
    layer = read_manifest(pack).manifest.layers[0]
    with mmap.mmap(-1, RECORD) as target, memoryview(target) as view:
        problem = read_verified(file, layer.offsets[expert], view, layer.checksums[expert])
        assert problem is not None or target[:] == record(0, expert)
    return problem


def with_errno(error: int) -> int:
    ctypes.set_errno(error)
    return -1


class TestTruncatedWhileMapped:
    """In a process of its own, which a signal would end."""

    @pytest.mark.parametrize("when", ["before", "populated", "copying"])
    def test_the_records_behind_the_cut_are_lost(self, pack: Path, when: str) -> None:
        code = """
            import os, sys
            from tests.expert_store.disk.test_mapped_file import *

            pack, when = Path(sys.argv[1]), sys.argv[2]
            whole = (pack / NAME).read_bytes()
            for pages in CUTS:
                (pack / NAME).write_bytes(whole)
                file = MappedFile(pack / NAME, page_cache=PageCache(1 << 30))
                assert read(file, pack, 4) is None
                cut = lambda: os.truncate(pack / NAME, int(pages * PAGE))
                populate, copy = file._populate, mapped_file.copy
                if when == "before":
                    cut()
                elif when == "populated":
                    file._populate = lambda *place: (cut(), populate(*place))
                else:
                    mapped_file.copy = lambda *what: (cut(), copy(*what))[1]
                print(read(file, pack, 4))
                file._populate, mapped_file.copy = populate, copy
                print(read(file, pack, 5))
                print(read(file, pack, 3))
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(pack), when],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        truncated = f"{pack / NAME} is truncated"
        damaged = f"its checksum does not match in {pack / NAME}"
        expected = []
        for pages in CUTS:
            # The page that is cut through stays mapped, and reads zeros behind the cut.
            zeros = pages == 10.5 and when != "before"
            expected += [damaged if zeros else truncated, truncated]
            expected.append("None" if pages else truncated)
        assert done.stdout.splitlines() == expected

    def test_mended_in_place_it_serves_again(self, file: MappedFile, pack: Path) -> None:
        whole = (pack / NAME).read_bytes()
        os.truncate(pack / NAME, 3 * PAGE)
        assert read(file, pack, 7) == f"{pack / NAME} is truncated"
        (pack / NAME).write_bytes(whole)
        assert read(file, pack, 7) is None

    def test_also_if_it_was_too_short_when_it_was_mapped(self, pack: Path) -> None:
        whole = (pack / NAME).read_bytes()
        os.truncate(pack / NAME, 0)
        file = MappedFile(pack / NAME, page_cache=PageCache(0), num_bytes=len(whole))
        assert read(file, pack, 7) == f"{pack / NAME} is truncated"
        (pack / NAME).write_bytes(whole)
        assert read(file, pack, 7) is None
        file.close()


@pytest.mark.parametrize("error", [errno.EFAULT, _EHWPOISON, errno.ENOMEM])
def test_a_page_that_cannot_be_brought_in(
    file: MappedFile, pack: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    advise = mapped_file.advise

    def failing(address: int, num_bytes: int, advice: int) -> int:
        bad = file._address + PAGE + RECORD + 17
        if advice == mapped_file._MADV_POPULATE_READ and address <= bad < address + num_bytes:
            return error
        return advise(address, num_bytes, advice)

    monkeypatch.setattr(mapped_file, "advise", failing)
    told = os.strerror(errno.EIO if error == errno.EFAULT else error)
    assert read(file, pack, 1) == f"{pack / NAME} could not be read ({told})"
    assert read(file, pack, 0) is None
    assert read(file, pack, 2) is None


def test_a_page_that_is_lost_before_it_is_copied(
    file: MappedFile, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mapped_file, "copy", lambda *_: with_errno(errno.EFAULT))
        assert read(file, pack, 1) == f"{pack / NAME} could not be read (Input/output error)"
    assert read(file, pack, 1) is None


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_where_processes_may_not_be_copied_from(
    file: MappedFile, pack: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refused(*_: object) -> int:
        tries.append(1)
        return with_errno(error)

    monkeypatch.setattr(mapped_file, "copy", refused)
    assert [read(file, pack, expert) for expert in range(8)] == [None] * 8
    assert len(tries) == 1
    os.truncate(pack / NAME, 3 * PAGE)
    assert read(file, pack, 7) == f"{pack / NAME} is truncated"


def test_a_kernel_that_populates_nothing(
    file: MappedFile, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advise, asked = mapped_file.advise, []

    def old(address: int, num_bytes: int, advice: int) -> int:
        asked.append(advice)
        if advice == mapped_file._MADV_POPULATE_READ:
            return errno.EINVAL
        return advise(address, num_bytes, advice)

    monkeypatch.setattr(mapped_file, "advise", old)
    assert [read(file, pack, expert) for expert in range(8)] == [None] * 8
    assert asked.count(mapped_file._MADV_POPULATE_READ) == 1
    assert asked.count(mmap.MADV_WILLNEED) == 8


def test_bits_that_flip_on_disk_are_noticed_and_mended(file: MappedFile, pack: Path) -> None:
    with (pack / NAME).open("r+b") as stream:
        stream.seek(PAGE + RECORD)
        byte = stream.read(1)[0]
        for value, problem in (
            (byte ^ 1, f"its checksum does not match in {pack / NAME}"),
            (byte, None),
        ):
            stream.seek(PAGE + RECORD)
            stream.write(bytes([value]))
            stream.flush()
            assert read(file, pack, 1) == problem
            assert read(file, pack, 2) is None


@pytest.mark.parametrize("replace", [os.unlink, lambda path: _other(path).replace(path)])
def test_a_file_that_is_replaced_serves_as_long_as_it_is_open(
    file: MappedFile, pack: Path, replace: Callable[[Path], None]
) -> None:
    replace(pack / NAME)
    assert [read(file, pack, expert) for expert in range(8)] == [None] * 8


def _other(path: Path) -> Path:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(3 * PAGE))
    return other


def test_no_room_to_map_it(pack: Path) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(PackError) as caught:
        MappedFile(pack / NAME, page_cache=PageCache(0), num_bytes=1 << 60)
    assert str(caught.value) == (
        f"{pack / NAME} cannot be mapped: Cannot allocate memory; "
        'set disk_io to "direct" for this pack.'
    )
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_the_page_cache_keeps_no_more_than_its_bound(pack: Path) -> None:
    file = MappedFile(pack / NAME, page_cache=(cache := PageCache(3 * RECORD)))
    file.forget(0, 17 * PAGE)
    assert _resident(file) == 0
    most = 0
    for expert in (5, 1, 3, 7, 0, 2, 6, 4):
        assert read(file, pack, expert) is None
        most = max(most, _resident(file))
        assert cache.num_bytes <= 3 * RECORD
    assert most == cache.num_bytes == 3 * RECORD
    file.close()
    assert cache.num_bytes == 0


def test_nothing_but_the_record_comes_into_the_page_cache(
    file: MappedFile, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the kernel is not told in time, and reads page after page as they are touched."""
    advise = mapped_file.advise

    def deaf(address: int, num_bytes: int, advice: int) -> int:
        return 0 if advice == mmap.MADV_WILLNEED else advise(address, num_bytes, advice)

    file.forget(0, 17 * PAGE)
    monkeypatch.setattr(mapped_file, "advise", deaf)
    assert read(file, pack, 3) is None
    assert _resident(file) == RECORD


def test_a_long_range_is_announced_in_pieces_that_the_kernel_follows(
    file: MappedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noted(address: int, num_bytes: int, advice: int) -> int:
        asked.append((address - file._address, num_bytes))
        return 0

    monkeypatch.setattr(mapped_file, "advise", noted)
    file.announce(PAGE, 300 << 10)
    piece = mapped_file.ANNOUNCED_BYTES
    assert asked == [(PAGE, piece), (PAGE + piece, piece), (PAGE + 2 * piece, 44 << 10)]
    file._page_cache.max_bytes = 300 << 10
    file.announce(PAGE, 300 << 10)
    assert len(asked) == 3, "it would be dropped before it is read"


def test_the_next_hint_is_announced_while_one_is_read(
    file: MappedFile, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what is demanded: all of that is begun at once, by as many threads as there are."""
    announced, done = list[int](), queue.Queue[str | None]()
    announce = file.announce

    def noted(offset: int, num_bytes: int) -> None:
        announced.append(offset)
        announce(offset, num_bytes)

    monkeypatch.setattr(file, "announce", noted)
    layer = read_manifest(pack).manifest.layers[0]
    with mmap.mmap(-1, 8 * RECORD) as memory, memoryview(memory) as view:
        jobs = [
            ReadJob(file, offset, view[start : start + RECORD], checksum, done.put, urgent=urgent)
            for start, offset, checksum, urgent in zip(
                range(0, 8 * RECORD, RECORD),
                layer.offsets,
                layer.checksums,
                [True] * 3 + [False] * 5,
                strict=True,
            )
        ]
        loader = Loader(1, hint_depth=1)
        loader.submit(*jobs)
        assert [done.get(timeout=10) for _ in jobs] == [None] * 8
        loader.close()
        assert memory[:] == b"".join(record(0, expert) for expert in range(8))
        for job in jobs:
            job.target.release()
    assert announced == [*layer.offsets[4:]]
    file.close()
    file.announce(PAGE, RECORD)  # too late, and harmless


def _resident(file: MappedFile) -> int:
    """How much of the file the page cache holds, in bytes."""
    pages = (ctypes.c_ubyte * 17)()
    libc = ctypes.CDLL(None)
    assert not libc.mincore(ctypes.c_void_p(file._address), ctypes.c_size_t(17 * PAGE), pages)
    return sum(page & 1 for page in pages) * PAGE


def test_what_was_read_is_not_this_process_s_memory(file: MappedFile, pack: Path) -> None:
    assert [read(file, pack, expert) for expert in range(8)] == [None] * 8
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.endswith(str(pack / NAME)))
    assert next(line.split() for line in lines[at:] if line.startswith("Rss:")) == [
        "Rss:",
        "0",
        "kB",
    ]
    assert _resident(file) > 0


def test_unmapped_when_it_is_closed(pack: Path) -> None:
    file = MappedFile(pack / NAME, page_cache=PageCache(1 << 30))
    assert read(file, pack, 1) is None
    assert str(pack / NAME) in Path("/proc/self/maps").read_text()
    file.close()
    file.close()
    assert str(pack / NAME) not in Path("/proc/self/maps").read_text()

"""The loader: order of reads, and what each failure of a disk becomes."""

import contextlib
import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from xxhash import xxh3_64_hexdigest

from expertd.errors import PackError
from expertd.faulty import FaultyFile
from expertd.loader import Loader, ReadJob, RecordFile
from tests.handmade import PAGE, make_pack, record

RECORD = 2 * PAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of records: that of expert ``i`` lies at page 1 + 2 * i."""
    return make_pack(tmp_path / "pack", layers=1, experts=8) / "experts-00000.safetensors"


@pytest.fixture
def file(path: Path) -> Iterator[FaultyFile]:
    file = FaultyFile(path)
    yield file
    file.faults.gate.set()
    file.close()


class Reads:
    """Jobs and what became of them."""

    def __init__(self, file: RecordFile) -> None:
        self._file = file
        self.done: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.targets: dict[int, mmap.mmap] = {}

    def job(self, expert: int, *, urgent: bool = True) -> ReadJob:
        self.targets[expert] = mmap.mmap(-1, RECORD)  # page-aligned, as O_DIRECT wants it
        return ReadJob(
            file=self._file,
            offset=PAGE + expert * RECORD,
            target=memoryview(self.targets[expert]),
            checksum=xxh3_64_hexdigest(record(0, expert)),
            done=lambda problem: self.done.put((expert, problem)),
            urgent=urgent,
        )

    def wait(self, count: int) -> list[int]:
        return [self.done.get(timeout=10)[0] for _ in range(count)]


@contextlib.contextmanager
def loading(num_threads: int = 1) -> Iterator[Loader]:
    loader = Loader(num_threads)
    try:
        yield loader
    finally:
        loader.close()


def read_one(file: FaultyFile, expert: int = 1) -> str | None:
    reads = Reads(file)
    with loading() as loader:
        loader.submit(reads.job(expert))
        problem = reads.done.get(timeout=10)[1]
    if problem is None:
        assert reads.targets[expert][:] == record(0, expert)
    return problem


def started(file: FaultyFile, count: int) -> None:
    """Waits until so many reads have begun."""
    while len(file.offsets) < count:
        time.sleep(0.0005)


# Order


def test_demand_goes_before_hints_and_each_in_its_order(file: FaultyFile) -> None:
    reads = Reads(file)
    with loading() as loader:
        file.faults.gate.clear()
        loader.submit(reads.job(0))
        started(file, 1)
        for expert, urgent in ((1, False), (2, True), (3, False), (4, True)):
            loader.submit(reads.job(expert, urgent=urgent))
        assert repr(loader) == "Loader(2 urgent, 2 hinted)"
        file.faults.gate.set()
        assert reads.wait(5) == [0, 2, 4, 1, 3]


def test_a_hurried_hint_is_demand(file: FaultyFile) -> None:
    reads = Reads(file)
    with loading() as loader:
        file.faults.gate.clear()
        loader.submit(reads.job(0))
        started(file, 1)
        hints = [reads.job(expert, urgent=False) for expert in (1, 2)]
        for hint in hints:
            loader.submit(hint)
        loader.hurry(hints[1])
        loader.hurry(hints[1])
        assert hints[1].urgent
        file.faults.gate.set()
        assert reads.wait(3) == [0, 2, 1]
        loader.hurry(hints[0])  # too late, and harmless


def test_withdrawn_reads_do_not_happen(file: FaultyFile) -> None:
    reads = Reads(file)
    with loading() as loader:
        file.faults.gate.clear()
        first, second, hint = reads.job(0), reads.job(1), reads.job(2, urgent=False)
        loader.submit(first)
        started(file, 1)
        loader.submit(second)
        loader.submit(hint)
        assert not loader.withdraw(first), "it has started"
        assert loader.withdraw(second)
        assert loader.withdraw(hint)
        assert not loader.withdraw(hint)
        file.faults.gate.set()
        assert reads.wait(1) == [0]
    assert reads.done.empty()
    assert len(file.offsets) == 1


def test_as_many_reads_at_once_as_threads(file: FaultyFile) -> None:
    reads = Reads(file)
    with loading(3) as loader:
        file.faults.gate.clear()
        for expert in range(5):
            loader.submit(reads.job(expert))
        started(file, 3)
        assert repr(loader) == "Loader(2 urgent, 0 hinted)"
        file.faults.gate.set()
        assert sorted(reads.wait(5)) == [0, 1, 2, 3, 4]


def test_closing_finishes_what_has_started_and_drops_the_rest(file: FaultyFile) -> None:
    reads = Reads(file)
    loader = Loader(1)
    file.faults.gate.clear()
    loader.submit(reads.job(0))
    started(file, 1)
    loader.submit(reads.job(1))
    opener = threading.Timer(0.05, file.faults.gate.set)
    opener.start()
    loader.close()
    assert file.faults.gate.is_set(), "it did not wait for the read in flight"
    assert reads.wait(1) == [0]
    assert reads.done.empty()
    loader.close()
    opener.join()


# Disks


@pytest.mark.parametrize("direct", [False, True])
def test_a_record_is_read_and_verified(path: Path, direct: bool) -> None:
    file = FaultyFile(path, direct=direct)
    assert read_one(file) is None
    file.close()


def test_short_reads_are_continued(file: FaultyFile) -> None:
    file.faults.most_bytes = 1000
    assert read_one(file) is None
    assert len(file.offsets) == -(-RECORD // 1000)


@pytest.mark.parametrize("end", [0, PAGE + RECORD, PAGE + RECORD + 5, PAGE + 2 * RECORD - 1])
def test_a_file_that_ends_too_early(file: FaultyFile, end: int) -> None:
    file.faults.end = end
    assert read_one(file) == f"{file.path} is truncated"


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("cut", [1, PAGE, PAGE + 1000])
def test_a_file_that_really_ends_too_early(path: Path, direct: bool, cut: int) -> None:
    os.truncate(path, path.stat().st_size - cut)
    file = FaultyFile(path, direct=direct)
    assert read_one(file, expert=7) == f"{path} is truncated"
    assert read_one(file, expert=6) is None
    file.close()


@pytest.mark.parametrize("position", [0, PAGE, RECORD - 1])
def test_a_flipped_bit_is_noticed(file: FaultyFile, position: int) -> None:
    file.faults.flipped = {PAGE + RECORD + position}
    assert read_one(file) == f"its checksum does not match in {file.path}"
    assert read_one(file, expert=2) is None, "the neighbour is whole"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE])
def test_an_error_of_the_disk_is_named(file: FaultyFile, number: int) -> None:
    file.faults.error = number
    assert read_one(file) == f"{file.path} could not be read ({os.strerror(number)})"
    file.faults.error = None
    assert read_one(file) is None, "the thread survived"


def test_a_closed_file_is_an_error_and_no_crash(file: FaultyFile) -> None:
    file.close()
    file.close()
    assert read_one(file) == f"{file.path} could not be read (Bad file descriptor)"


def test_where_direct_io_is_refused_the_page_cache_serves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def refusing(name: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(name, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    file = FaultyFile(path, direct=True)
    assert not file.direct
    assert read_one(file) is None
    file.close()


def test_a_missing_file_is_a_bad_pack(tmp_path: Path) -> None:
    for direct in (False, True):
        with pytest.raises(PackError, match="absent cannot be read: No such file"):
            RecordFile(tmp_path / "absent", direct=direct)

"""The loader: order of reads, and what each failure of a disk becomes."""

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from xxhash import xxh3_64_hexdigest

import expertd.disk.loader
from expertd.disk.loader import Loader, ReadJob
from expertd.disk.record_file import RecordFile
from expertd_testing.faulty_disk import FaultyFile, FaultyMappedFile
from expertd_testing.handmade import PAGE, make_pack, record
from expertstore.errors import PackError

RECORD = 2 * PAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of records: that of expert ``i`` lies at page 1 + 2 * i."""
    return make_pack(tmp_path / "pack", layers=1, experts=8) / "experts-00000.safetensors"


WAYS: dict[str, Callable[[Path], FaultyFile]] = {
    "buffered": FaultyFile,
    "direct": lambda path: FaultyFile(path, direct=True),
    "mapped": FaultyMappedFile,
}


@pytest.fixture(params=["buffered", "mapped"])
def file(path: Path, request: pytest.FixtureRequest) -> Iterator[FaultyFile]:
    file = WAYS[request.param](path)
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
def loading(num_threads: int = 1, *, staged: bool = False, hint_depth: int = 1) -> Iterator[Loader]:
    loader = Loader(num_threads, staged=staged, hint_depth=hint_depth)
    yield loader
    loader.close()  # not if the test failed, and left a read hanging


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
    deadline = time.monotonic() + 10
    while len(file.offsets) < count:
        assert time.monotonic() < deadline, "the reads did not begin"
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
        for expert in (0, 2, 4, 6, 1):
            loader.submit(reads.job(expert))
        started(file, 3)
        assert repr(loader) == "Loader(2 urgent, 0 hinted)"
        file.faults.gate.set()
        assert sorted(reads.wait(5)) == [0, 1, 2, 4, 6]


def test_one_batch_is_read_in_the_order_of_the_file_and_batches_as_they_came(
    file: FaultyFile,
) -> None:
    reads = Reads(file)
    with loading() as loader:
        file.faults.gate.clear()
        loader.submit(reads.job(7))
        started(file, 1)
        loader.submit(*[reads.job(expert) for expert in (5, 1, 3)])
        loader.submit(*[reads.job(expert) for expert in (4, 0, 2)])
        assert loader.num_urgent == 6
        file.faults.gate.set()
        assert reads.wait(7) == [7, 1, 3, 5, 0, 2, 4]


class TestRuns:
    """Records side by side are read in one."""

    @pytest.fixture
    def counted(self, file: FaultyFile, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many records each read had."""
        sizes: list[int] = []
        read_some = file.read_some

        def counting(targets: Sequence[memoryview], offset: int) -> int:
            sizes.append(len(targets))
            return read_some(targets, offset)

        monkeypatch.setattr(file, "read_some", counting)
        return sizes

    @pytest.fixture(params=WAYS)
    def file(self, path: Path, request: pytest.FixtureRequest) -> Iterator[FaultyFile]:
        """Direct reads are staged."""
        file = WAYS[request.param](path)
        yield file
        file.close()

    def read(self, file: FaultyFile, *experts: int) -> dict[int, str | None]:
        """What became of each of a batch; those without a problem are as in the pack."""
        reads = Reads(file)
        with loading(staged=file.direct) as loader:
            loader.submit(*map(reads.job, experts))
            problems = dict(reads.done.get(timeout=10) for _ in experts)
        for expert, problem in problems.items():
            if problem is None:
                assert reads.targets[expert][:] == record(0, expert)
        return problems

    def test_neighbours_are(self, file: FaultyFile, counted: list[int]) -> None:
        assert set(self.read(file, 6, 1, 2, 0, 4, 5).values()) == {None}
        assert counted == [3, 3]

    def test_up_to_a_size(
        self, file: FaultyFile, counted: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(expertd.disk.loader, "RUN_BYTES", 3 * RECORD - 1)
        assert set(self.read(file, *range(5)).values()) == {None}
        assert counted == [2, 2, 1]

    def test_larger_than_the_stage(
        self, file: FaultyFile, counted: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(expertd.disk.loader, "STAGE_BYTES", PAGE)
        monkeypatch.setattr(expertd.disk.loader, "RUN_BYTES", PAGE)
        assert self.read(file, 3) == {3: None}
        assert counted == ([1, 1] if file.direct else [1])

    def test_not_across_files(self, file: FaultyFile, path: Path, counted: list[int]) -> None:
        other = FaultyFile(path)
        reads, others = Reads(file), Reads(other)
        with loading() as loader:
            loader.submit(reads.job(0), others.job(1))
            reads.wait(1)
            others.wait(1)
        assert counted == [1]
        assert others.targets[1][:] == record(0, 1)
        other.close()

    def test_a_damaged_one_costs_no_other(self, file: FaultyFile, counted: list[int]) -> None:
        file.faults.flipped = {PAGE + RECORD + 5}
        problems = self.read(file, 0, 1, 2)
        assert counted == [3]
        assert [expert for expert, problem in problems.items() if problem] == [1]

    def test_nor_does_the_end_of_the_file(self, file: FaultyFile, counted: list[int]) -> None:
        file.faults.end = PAGE + 2 * RECORD
        problems = self.read(file, 0, 1, 2)
        assert counted == [3, 1, 1, 1]
        assert problems == {0: None, 1: None, 2: f"{file.path} is truncated"}

    def test_nor_a_bad_sector(self, file: FaultyFile, counted: list[int]) -> None:
        file.faults.bad = {PAGE + 2 * RECORD + 17}
        problems = self.read(file, 0, 1, 2)
        assert counted == [3, 1, 1, 1]
        assert problems == {
            0: None,
            1: None,
            2: f"{file.path} could not be read ({os.strerror(errno.EIO)})",
        }


class TestHintsLeaveTheDiskToDemand:
    @pytest.mark.parametrize(("threads", "depth", "at_once"), [(4, 1, 1), (4, 2, 2), (3, 8, 2)])
    def test_so_many_hints_are_read_at_once(
        self, file: FaultyFile, threads: int, depth: int, at_once: int
    ) -> None:
        """As deep as it is told, and with a thread to spare for demand."""
        reads = Reads(file)
        with loading(threads, hint_depth=depth) as loader:
            file.faults.gate.clear()
            for expert in (0, 2, 4, 6):
                loader.submit(reads.job(expert, urgent=False))
            started(file, at_once)
            time.sleep(0.05)
            assert len(file.offsets) == at_once
            assert loader.num_hinted == 4 - at_once
            file.faults.gate.set()
            assert sorted(reads.wait(4)) == [0, 2, 4, 6]

    @pytest.mark.parametrize(("num_demanded", "at_once"), [(1, 1), (2, 0), (3, 0)])
    def test_demand_that_is_read_counts(self, path: Path, num_demanded: int, at_once: int) -> None:
        slow, file = FaultyFile(path), FaultyFile(path)
        reads, hints = Reads(slow), Reads(file)
        with loading(8, hint_depth=2) as loader:
            slow.faults.gate.clear()
            file.faults.gate.clear()
            loader.submit(*[reads.job(2 * expert) for expert in range(num_demanded)])
            started(slow, num_demanded)
            for expert in (1, 3, 5):
                loader.submit(hints.job(expert, urgent=False))
            started(file, at_once)
            time.sleep(0.05)
            assert len(file.offsets) == at_once
            slow.faults.gate.set()
            reads.wait(num_demanded)
            started(file, 2)  # the demand's end makes room for both
            file.faults.gate.set()
            hints.wait(3)
        slow.close()
        file.close()

    def test_demand_does_not_wait_for_a_hint_that_hangs(self, path: Path) -> None:
        slow, file = FaultyFile(path), FaultyFile(path)
        hints, reads = Reads(slow), Reads(file)
        with loading(2) as loader:
            slow.faults.gate.clear()
            for expert in (0, 2, 4):
                loader.submit(hints.job(expert, urgent=False))
            started(slow, 1)
            loader.submit(*map(reads.job, (1, 3, 5)))
            assert reads.wait(3) == [1, 3, 5]
            slow.faults.gate.set()
            assert hints.wait(3) == [0, 2, 4]
        slow.close()
        file.close()

    def test_with_one_thread_it_waits_for_one(self, file: FaultyFile) -> None:
        reads = Reads(file)
        with loading(1) as loader:
            file.faults.gate.clear()
            for expert in (0, 2, 4):
                loader.submit(reads.job(expert, urgent=False))
            started(file, 1)
            loader.submit(*map(reads.job, (1, 3)))
            file.faults.gate.set()
            assert reads.wait(5) == [0, 1, 3, 2, 4]

    def test_a_hurried_hint_does_not_wait_for_another_that_hangs(self, path: Path) -> None:
        slow, file = FaultyFile(path), FaultyFile(path)
        hints, reads = Reads(slow), Reads(file)
        with loading(2) as loader:
            slow.faults.gate.clear()
            loader.submit(hints.job(0, urgent=False))
            started(slow, 1)
            hint = reads.job(1, urgent=False)
            loader.submit(hint)
            time.sleep(0.05)  # the other thread has looked and gone back to sleep
            loader.hurry(hint)
            assert reads.wait(1) == [1]
            slow.faults.gate.set()
            assert hints.wait(1) == [0]
        slow.close()
        file.close()


def test_checks_come_last_and_one_at_a_time(file: FaultyFile) -> None:
    reads, order, may_end = Reads(file), list[str](), threading.Event()

    def check(name: str) -> None:
        order.append(name)
        may_end.wait(10)

    with loading(2) as loader:
        file.faults.gate.clear()
        loader.submit(reads.job(0), reads.job(2), reads.job(4))
        started(file, 2)
        loader.check(lambda: check("first"))
        loader.check(lambda: check("second"))
        time.sleep(0.05)
        assert not order
        file.faults.gate.set()
        assert sorted(reads.wait(3)) == [0, 2, 4]
        while not order:
            time.sleep(0.001)
        loader.submit(reads.job(6))
        assert reads.wait(1) == [6], "a check under way left no thread for it"
        assert order == ["first"]
        may_end.set()
    assert order[0] == "first"


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


@pytest.mark.parametrize("way", WAYS)
def test_a_record_is_read_and_verified(path: Path, way: str) -> None:
    file = WAYS[way](path)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", [1, PAGE, PAGE + 1000])
def test_a_file_that_really_ends_too_early(path: Path, way: str, cut: int) -> None:
    os.truncate(path, path.stat().st_size - cut)
    file = WAYS[way](path)
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


def test_where_direct_reads_are_refused_the_page_cache_serves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems accept the flag when a file is opened."""
    plain = os.preadv

    def refusing(fd: int, targets: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(fd, targets, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    file = FaultyFile(path, direct=True)
    assert not file.direct
    assert read_one(file) is None
    file.close()


def test_a_missing_file_is_a_bad_pack(tmp_path: Path) -> None:
    for direct in (False, True):
        with pytest.raises(PackError, match="absent cannot be read: No such file"):
            RecordFile(tmp_path / "absent", direct=direct)

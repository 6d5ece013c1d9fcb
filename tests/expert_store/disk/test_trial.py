"""Which way is faster: decided by what was measured, and by nothing where little was."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from expertd.disk import trial
from expertd.disk.record_file import RecordFile
from expertd.disk.trial import NOT_TRIED, Trial, TrialRead, choose_reads, faster, try_both
from expertd.settings.disk_io import DiskIo

DIRECT, MMAP = DiskIo.DIRECT, DiskIo.MMAP


@pytest.mark.parametrize(
    ("direct", "mapped", "past_page_cache", "way"),
    [
        (2e9, 1e9, True, DIRECT),
        (2e9, 2.4e9, True, DIRECT),  # nearly a tie: not worth a second copy in RAM
        (2e9, 2.6e9, True, MMAP),
        (2e9, 2.1e9, False, MMAP),  # either fills the page cache, one of them within a bound
        (2e9, 1.9e9, False, DIRECT),
        (0.0, 0.0, True, DIRECT),
        (0.0, 0.0, False, DIRECT),
    ],
)
def test_the_faster_way(direct: float, mapped: float, past_page_cache: bool, way: DiskIo) -> None:
    assert faster(Trial(direct, mapped), past_page_cache=past_page_cache) is way


def test_samples_are_of_the_whole_pack_and_none_comes_twice() -> None:
    records = [TrialRead(i // 500, i % 500, 4096) for i in range(3000)]
    chosen = choose_reads(records)
    assert len(chosen) == len(set(chosen)) == 2 * trial.MAX_PAIRS
    assert {sample.file for sample in chosen} == set(range(6))
    assert choose_reads(records[:5]) != records[:5]
    assert sorted(choose_reads(records[:5])) == records[:5]
    assert choose_reads([]) == []


def test_of_large_records_only_the_beginning_is_read() -> None:
    (read,) = choose_reads([TrialRead(0, 4096, 13 << 20)])
    assert read == TrialRead(0, 4096, trial.MAX_PIECE_BYTES)


class File(RecordFile):
    """Reads take the time that they are told, by a clock that stands still otherwise."""

    def __init__(self, clock: SimpleNamespace, seconds: Callable[[int], float]) -> None:
        self._clock, self._seconds = clock, seconds
        self.read: list[int] = []
        self.forgotten: list[int] = []
        self.path, self.fd, self.direct = Path("fake"), -1, False

    def read_into(self, target: memoryview, offset: int) -> None:
        self.read.append(offset)
        self._clock.now += self._seconds(offset)

    def forget(self, offset: int, num_bytes: int) -> None:
        self.forgotten.append(offset)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(trial, "time", clock)
    return clock


SAMPLES = [TrialRead(0, number, 4096) for number in range(64)]


def test_both_ways_are_measured_in_turns(clock: SimpleNamespace) -> None:
    """By the median, so that one slow read says nothing; the first of each does not count."""
    direct = File(clock, lambda offset: 1.0 if offset == 8 else 4096e-9)
    mapped = File(clock, lambda offset: 2 * 4096e-9)
    measured = try_both([direct], [mapped], SAMPLES, keeps_cache=True)
    assert measured.direct == pytest.approx(1e9)
    assert measured.mapped == pytest.approx(5e8)
    assert direct.read == [0, 2, 4, 6, 8]  # which was too long
    assert mapped.read == [1, 3, 5, 7, 9]
    assert not direct.forgotten
    assert not mapped.forgotten


def test_what_will_not_stay_in_the_page_cache_does_not_count(clock: SimpleNamespace) -> None:
    direct, mapped = (File(clock, lambda _: 1e-6) for _ in range(2))
    try_both([direct], [mapped], SAMPLES, keeps_cache=False)
    assert direct.forgotten == direct.read == [*range(0, 64, 2)]
    assert mapped.forgotten == mapped.read == [*range(1, 64, 2)]


@pytest.mark.parametrize("num_samples", [0, 1, 2, 7])
def test_of_a_tiny_pack_nothing_is_said(clock: SimpleNamespace, num_samples: int) -> None:
    files = [File(clock, lambda _: 1e-6)]
    assert try_both(files, files, SAMPLES[:num_samples], keeps_cache=True) == NOT_TRIED
    assert try_both(files, files, SAMPLES[:8], keeps_cache=True).is_known


def test_a_slow_disk_is_asked_for_one_pair_and_no_more(clock: SimpleNamespace) -> None:
    direct, mapped = (File(clock, lambda _: 10.0) for _ in range(2))
    assert try_both([direct], [mapped], SAMPLES, keeps_cache=True) == NOT_TRIED
    assert (direct.read, mapped.read) == ([0], [1])


@pytest.mark.parametrize("error", [OSError, EOFError])
def test_what_cannot_be_read_does_not_count(clock: SimpleNamespace, error: type[Exception]) -> None:
    def seconds(offset: int) -> float:
        if offset > 8:
            raise error
        return 1e-6

    files = [File(clock, seconds)]
    measured = try_both(files, files, SAMPLES, keeps_cache=True)
    assert (measured.direct, measured.mapped) == pytest.approx((4096e6, 4096e6))
    files = [File(clock, lambda offset: seconds(9))]
    assert try_both(files, files, SAMPLES, keeps_cache=True) == NOT_TRIED

"""Which of the two ways to read a pack is faster here: tried on some of its records."""

import mmap
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expertd.disk.record_file import RecordFile
from expertd.settings.disk_io import DiskIo

MAX_SECONDS = 0.1
"""When no further pair of reads is begun."""
MAX_PAIRS = 32
MIN_PAIRS = 3
"""Of fewer the numbers are an accident's."""
MAX_PIECE_BYTES = 1 << 20
"""Of a larger record only its beginning is read."""
_BUFFER_BYTES = 2 << 20
ADVANTAGE = 1.25
"""So many times as fast as direct reads mapped ones must be: they take RAM for a second copy."""


class TrialRead(NamedTuple):
    """A record: the number of its file, and where it lies in there."""

    file: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Trial:
    """What both ways gave, in bytes per second; 0 where too little could be read to tell."""

    direct: float = 0.0
    mapped: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether both could be measured."""
        return self.direct > 0 and self.mapped > 0


NOT_TRIED = Trial()


def faster(trial: Trial, *, past_page_cache: bool) -> DiskIo:
    """The way to choose. ``past_page_cache``: direct reads are, and do not fill it themselves."""
    needed = ADVANTAGE if past_page_cache else 1.0
    if trial.is_known and trial.mapped > needed * trial.direct:
        return DiskIo.MMAP
    return DiskIo.DIRECT


def choose_reads(records: Sequence[TrialRead]) -> list[TrialRead]:
    """Some of the records, of all parts of the pack, in no order: as experts are asked for."""
    count = min(len(records), 2 * MAX_PAIRS)
    chosen = [records[i * len(records) // count] for i in range(count)]
    random.Random(0).shuffle(chosen)
    return [each._replace(num_bytes=min(each.num_bytes, MAX_PIECE_BYTES)) for each in chosen]


def try_both(
    direct: Sequence[RecordFile],
    mapped: Sequence[RecordFile],
    samples: Sequence[TrialRead],
    *,
    keeps_cache: bool,
) -> Trial:
    """Reads by one way and by the other in turns, no record twice.

    ``keeps_cache``: what is in the page cache will stay there, so that it counts; else it is
    dropped before a record is read. Records that cannot be read do not count.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    until = time.monotonic() + MAX_SECONDS
    size = max((sample.num_bytes for sample in samples), default=0)
    if not size:
        return NOT_TRIED
    with mmap.mmap(-1, max(size, _BUFFER_BYTES)) as pages, memoryview(pages) as buffer:
        pages.madvise(mmap.MADV_HUGEPAGE)  # as the loader's own, or the arena
        buffer[:: mmap.PAGESIZE] = bytes(-(-len(buffer) // mmap.PAGESIZE))  # no fault is measured
        for number, (files, sample) in enumerate(_in_turns(direct, mapped, samples)):
            way = number % 2
            if not way and number and time.monotonic() > until:
                break
            rate = _rate(files[sample.file], sample, buffer, keeps_cache=keeps_cache)
            if rate is not None and number >= 2:  # the first pair finds out where the file lies
                rates[way].append(rate)
    if min(map(len, rates)) < MIN_PAIRS:
        return NOT_TRIED
    return Trial(*map(statistics.median, rates))


def _in_turns(
    direct: Sequence[RecordFile], mapped: Sequence[RecordFile], samples: Sequence[TrialRead]
) -> Iterator[tuple[Sequence[RecordFile], TrialRead]]:
    for first, second in zip(samples[::2], samples[1::2], strict=False):
        yield direct, first
        yield mapped, second


def _rate(
    file: RecordFile, sample: TrialRead, buffer: memoryview, *, keeps_cache: bool
) -> float | None:
    """Bytes per second; None if the record cannot be read."""
    target = buffer[: sample.num_bytes]
    try:
        if not keeps_cache:
            file.forget(sample.offset, sample.num_bytes)
        began = time.perf_counter()
        file.read_into(target, sample.offset)
        return sample.num_bytes / (time.perf_counter() - began)
    except (OSError, EOFError):
        return None

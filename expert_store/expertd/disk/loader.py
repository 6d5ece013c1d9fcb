"""The loader: threads that read records from packs into the arena and verify them.

Demand goes before hints, and hints before checks of what is resident. What is submitted
together is read in the order of the file, and small records that lie side by side in one read:
of 64 KiB records one at a time a disk gives less than half of what it could. One seam,
:class:`~expertd.disk.record_file.RecordFile`, touches the disk.
"""

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from xxhash import xxh3_64_hexdigest

from expertd.disk.record_file import RecordFile

RUN_BYTES = 512 << 10
"""Neighbours are read together up to this size; larger reads gain nothing (docs/store-speed.md)."""
STAGE_BYTES = 4 << 20
"""What a thread reads at once, where it reads by way of a buffer; no less than ``RUN_BYTES``."""
_MAX_RUN = 512  # records: the kernel takes 1024 pieces in a read


@dataclass(eq=False)
class ReadJob:
    """One record to read into ``target``, a slot of the arena."""

    file: RecordFile
    offset: int
    target: memoryview
    checksum: str
    done: Callable[[str | None], None]
    """Called on a loader thread with None, or with what is wrong with the record."""
    urgent: bool
    seconds: float = 0.0
    """What reading and verifying took, its neighbours in one read included; once ``done`` is
    called."""


class Loader:
    """``num_threads`` readers over three queues.

    ``staged``: direct reads go to a buffer of the thread in huge pages and are copied from there.
    For an arena without huge pages: its memory lies scattered in the host's RAM, and some disks
    read into thousands of small pieces at less than half their speed (docs/store-speed.md).

    A hinted read is begun only where no demanded one waits and fewer than ``hint_depth`` reads of
    either kind are under way: so many share the disk with a demanded one at worst. One thread is
    kept for demand, if there are two. Of a mapped file, the kernel begins with the next hinted
    record while one is read. Checks of what is in the arena come last, one at a time.
    """

    def __init__(self, num_threads: int, *, staged: bool = False, hint_depth: int = 2) -> None:
        self._hint_depth, self._max_hints = hint_depth, max(1, num_threads - 1)
        self._staged, self._of_thread = staged, threading.local()
        self._urgent: deque[ReadJob] = deque()
        self._hinted: deque[ReadJob] = deque()
        self._probes: deque[Callable[[], object]] = deque()
        self._checks: deque[Callable[[], object]] = deque()
        self._checking = False
        self._num_reading = self._num_hints_read = 0
        self._wake = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expertd-loader-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"Loader({self.num_urgent} urgent, {self.num_hinted} hinted)"

    @property
    def num_urgent(self) -> int:
        """Demanded reads that have not begun."""
        return len(self._urgent)

    @property
    def num_hinted(self) -> int:
        """Hinted reads that have not begun."""
        return len(self._hinted)

    def submit(self, *jobs: ReadJob) -> None:
        """Queues reads behind those before; those of one call are read in the file's order."""
        ordered = sorted(jobs, key=lambda job: (job.file.fd, job.offset))
        with self._wake:
            for job in ordered:
                (self._urgent if job.urgent else self._hinted).append(job)
            self._wake.notify(len(jobs))

    def probe(self, done: Callable[[], object]) -> None:
        """Has a loader thread call ``done``, ahead of all reads: whether any still works."""
        with self._wake:
            self._probes.append(done)
            self._wake.notify()

    def check(self, check: Callable[[], object]) -> None:
        """Has a loader thread call ``check`` when nothing waits to be read; it must not raise."""
        with self._wake:
            self._checks.append(check)
            self._wake.notify()

    def hurry(self, job: ReadJob) -> None:
        """Moves a hinted read that is not yet started among the urgent ones."""
        with self._wake:
            if not job.urgent and job in self._hinted:
                self._hinted.remove(job)
                job.urgent = True
                self._urgent.append(job)
                self._wake.notify()  # the hint's own wake-up may have found another hint read

    def withdraw(self, job: ReadJob) -> bool:
        """Takes back a read; False if it has started."""
        with self._wake:
            for queue in (self._urgent, self._hinted):
                if job in queue:
                    queue.remove(job)
                    return True
        return False

    def close(self) -> None:
        """Drops what has not started and waits for what has."""
        with self._wake:
            self._closing = True
            self._urgent.clear()
            self._hinted.clear()
            self._checks.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        self._of_thread.stage = _new_stage() if self._staged else None
        while work := self._take():
            work()

    def _take(self) -> Callable[[], object] | None:
        """What a thread does next; nothing when closing."""
        with self._wake:
            while not self._closing:
                if self._probes:
                    return self._probes.popleft()
                if self._urgent:
                    self._num_reading += 1
                    return partial(self._read, _next_run(self._urgent))
                if self._hinted and self._may_read_hint():
                    self._num_hints_read += 1
                    job = self._hinted.popleft()
                    return partial(self._read_hint, job, self._hinted[0] if self._hinted else None)
                if self._checks and not self._checking and not self._hinted:
                    self._checking = True
                    return partial(self._check, self._checks.popleft())
                self._wake.wait()
        return None

    def _may_read_hint(self) -> bool:
        reading = self._num_reading + self._num_hints_read
        return reading < self._hint_depth and self._num_hints_read < self._max_hints

    # Who ends one of these looks for the next itself, so nobody else has to be woken, but for a
    # second hint: there may be room for two once several demanded reads have ended.

    def _read(self, run: Sequence[ReadJob]) -> None:
        read_run(run, self._of_thread.stage)
        with self._wake:
            self._num_reading -= 1
            if len(self._hinted) > 1:
                self._wake.notify()

    def _read_hint(self, job: ReadJob, following: ReadJob | None) -> None:
        if following is not None:  # so that the disk works while this one is copied and verified
            following.file.announce(following.offset, len(following.target))
        read_run([job], self._of_thread.stage)
        with self._wake:
            self._num_hints_read -= 1

    def _check(self, check: Callable[[], object]) -> None:
        check()
        with self._wake:
            self._checking = False


def _next_run(queue: deque[ReadJob]) -> list[ReadJob]:
    """Takes the first job, and those that follow it in the queue as in its file."""
    run = [queue.popleft()]
    num_bytes = len(run[0].target)
    while queue and len(run) < _MAX_RUN:
        job = queue[0]
        num_bytes += len(job.target)
        if (
            num_bytes > RUN_BYTES
            or job.file is not run[0].file
            or job.offset != run[-1].offset + len(run[-1].target)
        ):
            break
        run.append(queue.popleft())
    return run


def read_run(jobs: Sequence[ReadJob], stage: memoryview | None = None) -> None:
    """Reads and verifies records that lie side by side, and tells each job how it went.

    By way of ``stage``, if there is one and it helps.
    """
    if not jobs[0].file.direct:
        stage = None
    began = time.monotonic()
    whole = len(jobs) > 1 and _is_read_whole(jobs, stage)
    for job in jobs:
        try:
            if whole:
                problem = verify(job.file, job.target, job.checksum)
            else:
                problem = read_verified(job.file, job.offset, job.target, job.checksum, stage)
        except Exception as error:
            # A bug of ours; without an answer every fetch of the record would hang.
            problem = f"reading it failed: {error!r}"
        job.seconds = time.monotonic() - began
        job.done(problem)


def _is_read_whole(jobs: Sequence[ReadJob], stage: memoryview | None) -> bool:
    """Reads all in one. If that fails each is read by itself: the damage is not its neighbours'."""
    targets, start = [job.target for job in jobs], jobs[0].offset
    pieces = targets
    if stage is not None:
        ends = [job.offset + len(job.target) - start for job in jobs]
        pieces = [stage[job.offset - start : end] for job, end in zip(jobs, ends, strict=True)]
    try:
        count = jobs[0].file.read_some(pieces, start)
    except OSError:
        return False
    if count != sum(map(len, targets)):
        return False
    if stage is not None:
        for target, piece in zip(targets, pieces, strict=True):
            _copy(piece, target)
    return True


def read_verified(
    file: RecordFile,
    offset: int,
    target: memoryview,
    checksum: str,
    stage: memoryview | None = None,
) -> str | None:
    """Reads a record and verifies it; what is wrong with it, or None."""
    try:
        if stage is None:
            file.read_into(target, offset)
        else:
            for start in range(0, len(target), len(stage)):
                part = target[start : start + len(stage)]
                file.read_into(stage[: len(part)], offset + start)
                _copy(stage[: len(part)], part)
    except EOFError:
        return f"{file.path} is truncated"
    except OSError as error:
        return f"{file.path} could not be read ({error.strerror})"
    return verify(file, target, checksum)


def _new_stage() -> memoryview:
    pages = mmap.mmap(-1, STAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


def _copy(source: memoryview, target: memoryview) -> None:
    # numpy lets go of the interpreter's lock meanwhile, an assignment of slices does not.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def verify(file: RecordFile, target: memoryview, checksum: str) -> str | None:
    """What is wrong with a record that was read, or None."""
    return None if matches(target, checksum) else f"its checksum does not match in {file.path}"


def matches(record: memoryview, checksum: str) -> bool:
    """Whether a record is what its checksum says."""
    return bool(xxh3_64_hexdigest(record) == checksum)

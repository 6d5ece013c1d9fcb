"""The loader: threads that read records from packs into the arena and verify them.

Demand goes before prefetch. One seam, :class:`RecordFile`, touches the disk.
"""

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from expertd.errors import PackError

PAGE_BYTES = 4096


class RecordFile:
    """A file of a pack, read past the page cache (O_DIRECT) where the file system can.

    The arena is the cache: keeping every record in the page cache too would double its RAM.
    Raises :class:`PackError` if the file cannot be opened.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        self.path = path
        self.fd = -1
        self.direct = False
        try:
            if direct:
                self.direct = self._open_direct()
            if not self.direct:
                self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}.") from error

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills ``target`` from byte ``offset``. Raises OSError; EOFError if the file ends."""
        done = 0
        while done < len(target):
            count = self.read_some(target[done:], offset + done)
            if not count:
                raise EOFError
            done += count
            if self.direct and done % PAGE_BYTES and done < len(target):
                raise EOFError  # only the end of a file is read in other than whole blocks

    def read_some(self, target: memoryview, offset: int) -> int:
        """One read, which may be short; 0 at the file's end. Raises OSError."""
        return os.preadv(self.fd, [target], offset)

    def close(self) -> None:
        """Closes the file; twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _open_direct(self) -> bool:
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:  # tmpfs and some network file systems
                return False
            raise
        return True


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
    """What reading and verifying took, once ``done`` is called."""


class Loader:
    """``num_threads`` readers over two queues."""

    def __init__(self, num_threads: int) -> None:
        self._urgent: deque[ReadJob] = deque()
        self._hinted: deque[ReadJob] = deque()
        self._probes: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expertd-loader-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"Loader({len(self._urgent)} urgent, {len(self._hinted)} hinted)"

    @property
    def num_urgent(self) -> int:
        """Demand reads that no thread has begun."""
        return len(self._urgent)

    @property
    def num_hinted(self) -> int:
        """Hinted reads that no thread has begun."""
        return len(self._hinted)

    def submit(self, job: ReadJob) -> None:
        """Queues a read."""
        with self._wake:
            (self._urgent if job.urgent else self._hinted).append(job)
            self._wake.notify()

    def probe(self, done: Callable[[], object]) -> None:
        """Has a loader thread call ``done``, ahead of all reads: whether any still works."""
        with self._wake:
            self._probes.append(done)
            self._wake.notify()

    def hurry(self, job: ReadJob) -> None:
        """Moves a hinted read that is not yet started among the urgent ones."""
        with self._wake:
            if not job.urgent and job in self._hinted:
                self._hinted.remove(job)
                job.urgent = True
                self._urgent.append(job)

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
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._probes or self._urgent or self._hinted or self._closing
                )
                if self._closing:
                    return
                probe = self._probes.popleft() if self._probes else None
                if probe is None:
                    job = (self._urgent or self._hinted).popleft()
            if probe is not None:
                probe()
                continue
            began = time.monotonic()
            try:
                problem = read_verified(job.file, job.offset, job.target, job.checksum)
            except Exception as error:
                # A bug of ours; without an answer every fetch of the record would hang.
                problem = f"reading it failed: {error!r}"
            job.seconds = time.monotonic() - began
            job.done(problem)


def read_verified(file: RecordFile, offset: int, target: memoryview, checksum: str) -> str | None:
    """Reads a record and verifies it; what is wrong with it, or None."""
    try:
        file.read_into(target, offset)
    except EOFError:
        return f"{file.path} is truncated"
    except OSError as error:
        return f"{file.path} could not be read ({error.strerror})"
    if xxh3_64_hexdigest(target) != checksum:
        return f"its checksum does not match in {file.path}"
    return None

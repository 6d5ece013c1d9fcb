"""What is measured of the host, and how."""

import mmap
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from expertd.disk.loader import Loader, ReadJob
from expertd.disk.record_file import RecordFile
from expertd.settings.config import ServeConfig
from expertd_inference.advice import probes
from expertd_inference.advice.values import Reading
from expertstore.pack.layout import PAGE_BYTES

SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MAX_READ_BYTES = 16 << 20
"""Of one record at a time: the reading of larger ones is taken to go on at that rate."""
_BATCHES = 4
_MAX_BATCH_SECONDS = 0.25


def disk_free(path: Path) -> int:
    """Bytes on the disk that ``path`` lies on."""
    return shutil.disk_usage(path).free


def readings(
    path: Path,
    record_bytes: Mapping[str, tuple[int, int]],
    say: Callable[[str], None],
) -> tuple[float, dict[str, Reading]]:
    """The disk's own rate in bytes per second, and the loader's times of each kind of record.

    ``path`` as for :class:`~expertd_inference.advice.probes.StorageProbe`; ``record_bytes`` by
    scheme, with how many a layer asks for at most. Raises what the probe raises.
    """
    with probes.StorageProbe(path, say=say) as probe:
        rate = probe.rate(0.4)
        staged = not _has_huge_pages()
        kinds = {
            kind: _reading(probe.path, *kind, staged=staged) for kind in {*record_bytes.values()}
        }
        return rate, {scheme: kinds[kind] for scheme, kind in record_bytes.items()}


def _reading(path: Path, record_bytes: int, most: int, *, staged: bool) -> Reading:
    size = min(record_bytes, MAX_READ_BYTES, path.stat().st_size) // PAGE_BYTES * PAGE_BYTES
    scale = record_bytes / size
    file = RecordFile(path, direct=True)
    loader = Loader(ServeConfig.loader_threads, staged=staged)
    memory = mmap.mmap(-1, most * size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    targets = [view[start : start + size] for start in range(0, most * size, size)]
    for target in targets:
        target[::PAGE_BYTES] = bytes(len(range(0, size, PAGE_BYTES)))  # arenas are prefaulted
    places = list(range(0, path.stat().st_size - size + 1, size))
    try:
        one = scale * _batch_seconds(loader, file, targets[:1], places)
        many = scale * _batch_seconds(loader, file, targets, places) if most > 1 else one
    finally:
        loader.close()
        file.close()
        for target in targets:
            target.release()
        view.release()
        memory.close()
    return Reading(one, many, most)


def _batch_seconds(
    loader: Loader, file: RecordFile, targets: Sequence[memoryview], places: Sequence[int]
) -> float:
    """Seconds until all are read, in the median."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < _BATCHES or (
        len(seconds) < 3 * _BATCHES and time.perf_counter() - began < _MAX_BATCH_SECONDS
    ):
        done = threading.Semaphore(0)

        def finished(_: str | None, done: threading.Semaphore = done) -> None:
            done.release()

        # Here and there in the file. The checksum is none: what is read is no record.
        step = 7919 * (len(seconds) + 1)
        jobs = [
            ReadJob(
                file,
                places[(step * (number + 1)) % len(places)],
                target,
                "",
                finished,
                urgent=True,
            )
            for number, target in enumerate(targets)
        ]
        start = time.perf_counter()
        loader.submit(*jobs)
        for _ in jobs:
            done.acquire()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _has_huge_pages() -> bool:
    """Whether the daemon's arena would get them; without, its loader reads by way of a buffer."""
    try:
        return "[never]" not in SHMEM.read_text() and "[deny]" not in SHMEM.read_text()
    except OSError:
        return False


def num_cores() -> int:
    """Of those that this process may use."""
    return len(os.sched_getaffinity(0))

"""Part 3: fetching what is not in RAM, beside plain parallel reads of the same file.

By both ways to read a pack, in turns; by mmap with an empty page cache, and with one that has all.
"""

import mmap
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import expertd.disk.loader
from bench.figures import Bench, Figure, compared, timed
from bench.page_cache import fill_with_file, forget_file, write_out
from expertd.disk.loader import Loader, ReadJob
from expertd.disk.record_file import RecordFile
from expertd.settings.config import ServeConfig
from expertd.settings.disk_io import DiskIo
from expertd_client import Client
from expertd_testing.daemon import serving
from expertd_testing.handmade import PAGE, make_pack
from expertstore.pack.reader import PackReader, RecordPlace

_SIZES = {"8 KiB": 8 << 10, "64 KiB": 64 << 10, "256 KiB": 256 << 10, "1.7 MiB": 1728 << 10,
          "13 MiB": 13 << 20}  # fmt: skip
DIRECT, MMAP, WARM = "direct", "mmap", "mmap, page cache warm"
WAYS = {DIRECT: DiskIo.DIRECT, MMAP: DiskIo.MMAP, WARM: DiskIo.MMAP}
_PLAIN, _FILE = "plain", "experts-00000.safetensors"
_BATCH = 128  # a layer's experts, as a prompt touches them
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_FEW = 8  # a token's
_THREADS = ServeConfig.loader_threads


def measure(bench: Bench) -> Iterator[Figure]:
    """Per record size: a layer at a time, 8 at a time, and what checksums cost."""
    for name, size in _SIZES.items():
        layers, experts = _shape(bench.pack_bytes, size)
        bench.say(f"cold reads: a pack with {layers * experts} records of {name}")
        pack = make_pack(
            bench.folder / f"cold-{size}",
            layers=layers,
            experts=experts,
            experts_per_token=min(8, experts),
            record_bytes=size,
        )
        write_out(pack)
        num_bytes = layers * experts * size
        memory = place(num_bytes)
        with serving({"m": pack}, ram=num_bytes, socket=bench.folder / f"s{size}") as daemon:
            for batch in (_BATCH, _FEW):
                if batch == _FEW and experts < 2 * _FEW:
                    continue
                rates: dict[str, list[float]] = {way: [] for way in (*WAYS, _PLAIN)}
                for number in range(bench.rounds):
                    bench.say(f"cold reads: {name}, {batch} at a time, {number + 1}")
                    times = {_PLAIN: read_plainly(pack, size, memory)}
                    for way, disk_io in WAYS.items():
                        with Client(daemon.socket) as client:
                            client.unload_model("m")
                            (fill_with_file if way == WARM else forget_file)(pack / _FILE)
                            client.load_model("m", pack, disk_io=disk_io)
                        times[way] = fetch_all(daemon.socket, batch)
                    for way, seconds in times.items():
                        rates[way].append(num_bytes / seconds / 2**30)
                turns = list(zip(rates[DIRECT], rates[_PLAIN], strict=True))
                # A few at a time the disk rests while each answer and the next call travel.
                goal = 0.9 if batch == _BATCH else None
                at_once = min(batch, experts)
                what = f"cold Fetch, {at_once} records of {name} at once / preadv"
                yield compared("cold", what, "GiB/s", turns, at_least=goal)
                for way in (MMAP, WARM):
                    what = f"cold Fetch, {at_once} records of {name} at once, {way} / direct"
                    turns = list(zip(rates[way], rates[DIRECT], strict=True))
                    yield compared("cold", what, "GiB/s", turns)
            bench.say(f"cold reads: checksums of {name}")
            yield checksums(bench, pack, name, memory)


def _shape(pack_bytes: int, record_bytes: int) -> tuple[int, int]:
    """Layers and experts: batches as large as layers of real models are, if there is room."""
    experts = min(_BATCH, max(8, pack_bytes // 2 // record_bytes))
    layers = min(48, pack_bytes // (experts * record_bytes))
    return max(1, layers), experts


def place(num_bytes: int) -> memoryview:
    """Private memory in huge pages, all present: what a disk's driver likes best."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    pages.madvise(_MADV_POPULATE_WRITE)
    return memoryview(pages)


def fetch_all(socket: Path, batch: int) -> float:
    """Seconds to fetch every record, ``batch`` of one layer at a time, none being resident."""
    with Client(socket) as store, store.attach("m") as session:

        def fetch() -> None:
            for layer in session.model.layers.values():
                for start in range(0, layer.num_experts, batch):
                    experts = range(start, min(start + batch, layer.num_experts))
                    session.acquire(layer.layer, experts).release()

        return timed(fetch)


def read_plainly(pack: Path, record_bytes: int, memory: memoryview) -> float:
    """Seconds to read every record by one preadv, with as many threads as the daemon has.

    Each to a place of its own: the same bytes over and over would stay in the CPU's cache.
    """
    file = RecordFile(pack / _FILE, direct=True)

    def read(reader: int) -> None:
        step = _THREADS * record_bytes
        for offset in range(reader * record_bytes, len(memory), step):
            os.preadv(file.fd, [memory[offset : offset + record_bytes]], PAGE + offset)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(_THREADS)]

    def read_all() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    seconds = timed(read_all)
    file.close()
    return seconds


def checksums(bench: Bench, pack: Path, name: str, memory: memoryview) -> Figure:
    """The loader by itself with and without verifying what it has read."""
    with PackReader(pack) as reader:
        places = list(reader.places())
    file = RecordFile(places[0].path, direct=True)
    turns = []
    for _ in range(bench.rounds):
        verified = timed(lambda: _load(file, places, memory))
        with mock.patch.object(expertd.disk.loader, "verify", new=_believe):
            turns.append((1e3 * verified, 1e3 * timed(lambda: _load(file, places, memory))))
    file.close()
    what = f"loading records of {name}, verified / not"
    return compared("cold", what, "ms", turns, at_most=1.1)


def _believe(*_: object) -> None:
    """In place of verifying; a mock would cost more than what it stands for."""


def _load(file: RecordFile, places: list[RecordPlace], memory: memoryview) -> None:
    loader, left, done = Loader(_THREADS), len(places), threading.Semaphore(0)
    problems: list[str] = []

    def finished(problem: str | None) -> None:
        if problem is not None:
            problems.append(problem)
        done.release()

    jobs, start = [], 0
    for record in places:
        target = memory[start : start + record.num_bytes]
        jobs.append(ReadJob(file, record.offset, target, record.checksum, finished, urgent=True))
        start += record.num_bytes
    loader.submit(*jobs)
    for _ in range(left):
        done.acquire()
    loader.close()
    if problems:
        raise RuntimeError(f"the bench's own pack is damaged: {problems[0]}")


def median_read_seconds(pack: Path, record_bytes: int, count: int) -> float:
    """What one record takes by itself."""
    file = RecordFile(pack / _FILE, direct=True)
    memory, seconds = place(record_bytes), []
    for offset in range(PAGE, PAGE + count * record_bytes, record_bytes):
        began = time.perf_counter()
        os.preadv(file.fd, [memory], offset)
        seconds.append(time.perf_counter() - began)
    file.close()
    return statistics.median(seconds)

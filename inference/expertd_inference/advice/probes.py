"""What this host can give at best: how fast its memory, its disk and its GPU's link are.

The limits beside which figures stand, and from which :mod:`expertd_inference.advice` predicts. All
rates are in bytes per second, of bytes read, and the median of several turns: other tenants of a
machine take their share of some. A probe is kept open to be asked in turns with what is
compared with it; the functions ask it once.
"""

import ctypes
import mmap
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from expertd.disk.record_file import RecordFile
from expertd.settings.config import ServeConfig
from expertd_inference.device.cuda import CudaDevice
from expertd_inference.device.device import Device
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import read_memory
from expertstore.closing import Closing
from expertstore.errors import DeviceError, InvalidInputError, PackError
from expertstore.pack.layout import PAGE_BYTES
from expertstore.pack.manifest import MANIFEST_NAME, read_manifest
from expertstore.sizes import format_bytes

Say = Callable[[str], None]
"""Is told, in one sentence, why a rate is not quite what its name says."""

MEMORY_BYTES = 1 << 30
"""What is read again and again: a processor's caches hold next to none of it by the time it comes
round. Of a quarter as much, 32 MiB of cache still served a twentieth."""
FILL = 0x3C
"""Every byte of it. Not 0, or all pages were one; and as 16-bit floats an everyday number, so that
kernels may be tried on it."""
BYTES_PER_THREAD = 32 << 20
READ_FORMS = [(streams, ahead) for streams in (1, 2, 4) for ahead in (0, 1024, 4096)]
"""Of the native read loop: at so many places at once, prefetching so many bytes ahead."""
_MIN_TURNS = 5
_FILLED_BYTES = 8 << 20

FILE_BYTES = 256 << 20
"""Of a file made to be read: writing it takes longer than the reading."""
PIECE_BYTES = 2 << 20
DEPTH = ServeConfig.loader_threads
_SLICES = 4

_LINK_COPIES, _LINK_BYTES = 8, 16 << 20


def _warn(message: str) -> None:
    sys.stderr.write(f"expertd: {message}\n")


class MemoryProbe(Closing):
    """Shared memory, mapped read-only as a worker maps the arena, to be read by ``threads``.

    By the native read loop, in the form that is fastest here; without the native library by
    numpy, which reads slower, and ``say`` is told. :meth:`close` frees the memory.
    """

    def __init__(self, threads: int, *, say: Say = _warn, num_bytes: int | None = None) -> None:
        self.threads = threads
        size = num_bytes or max(MEMORY_BYTES, threads * BYTES_PER_THREAD)
        self.num_bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("expertd-probe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.num_bytes)
            with mmap.mmap(fd, self.num_bytes) as writable:
                writable.madvise(mmap.MADV_HUGEPAGE)
                piece = bytes([FILL]) * _FILLED_BYTES
                for start in range(0, self.num_bytes, _FILLED_BYTES):  # Ctrl-C may come between
                    end = min(start + _FILLED_BYTES, self.num_bytes)
                    writable[start:end] = piece[: end - start]
            self._mapping = mmap.mmap(fd, self.num_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._view = np.frombuffer(self._mapping, np.uint8)
        self.arena = ArenaTensors(self._view.ctypes.data, self.num_bytes)
        """The memory as a worker sees the arena, until :meth:`close`."""
        self._next = 0
        self._pool: ThreadPoolExecutor | None = None
        if reason := native_library().reason:
            say(
                f"memory is read by numpy, slower than it could be, for there are no native "
                f"kernels: {reason}."
            )
            self._pool = ThreadPoolExecutor(threads)
        self._form = self._fastest_form()

    def __repr__(self) -> str:
        return f"<MemoryProbe {self.threads} threads, {format_bytes(self.num_bytes)}>"

    def rate(self, seconds: float = 0.0) -> float:
        """Bytes per second: the median of the reads that begin within ``seconds``, at least 5."""
        turns: list[float] = []
        end = time.perf_counter() + seconds
        while len(turns) < _MIN_TURNS or time.perf_counter() < end:
            turns.append(self._read(self._form))
        return statistics.median(turns)

    def close(self) -> None:
        """Frees the memory; twice is harmless."""
        if self._pool is not None:
            self._pool.shutdown()
        for view in ("arena", "_view"):  # they would keep it from being closed
            self.__dict__.pop(view, None)
        self._mapping.close()

    def _fastest_form(self) -> tuple[int, int]:
        if self._pool is not None:
            return READ_FORMS[0]
        rates = {form: [self._read(form) for _ in range(3)] for form in READ_FORMS}
        return max(READ_FORMS, key=lambda form: statistics.median(rates[form]))

    def _read(self, form: tuple[int, int]) -> float:
        """A quarter of the memory, the one after that which was read last."""
        num_bytes = self.num_bytes // 4 // 64 * 64
        start = self._next
        self._next = start + num_bytes if start + 2 * num_bytes <= self.num_bytes else 0
        began = time.perf_counter()
        if self._pool is None:
            read_memory(self._view.ctypes.data + start, num_bytes, self.threads, *form)
        else:
            words = self._view[start : start + num_bytes].view(np.uint64)
            # numpy lets go of the interpreter's lock while it adds up.
            list(self._pool.map(np.sum, np.array_split(words, self.threads)))
        return num_bytes / (time.perf_counter() - began)


def memory_read_rate(threads: int, seconds: float = 0.3, *, say: Say = _warn) -> float:
    """Bytes per second that so many threads read from RAM at once, and do nothing else.

    Takes half a second more than ``seconds``, and 1 GiB of memory meanwhile (more with many
    threads: see :class:`MemoryProbe`).
    """
    with MemoryProbe(threads, say=say) as probe:
        return probe.rate(seconds)


class StorageProbe(Closing):
    """A file on the disk in question, read past the page cache as the daemon's loader reads.

    ``path`` is a file of some size, a pack (of which the largest file of experts is read), or
    another directory, in which a file is made, and removed by :meth:`close`. Where a file system
    does not read past the page cache, ``say`` is told, for then memory is measured. Raises
    PackError or InvalidInputError if there is nothing to be read or written.
    """

    def __init__(
        self,
        path: Path,
        *,
        piece_bytes: int = PIECE_BYTES,
        say: Say = _warn,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self._made: Path | None = None
        if path.is_dir() and not (path / MANIFEST_NAME).exists():
            path = self._made = _make_file(path, file_bytes)
        elif path.is_dir():
            path = max(
                (path / file.name for file in read_manifest(path).manifest.files),
                key=lambda file: file.stat().st_size if file.exists() else -1,
            )
        try:
            self._file = RecordFile(path, direct=True)
            size = os.fstat(self._file.fd).st_size
        except PackError:
            self._remove()
            raise
        self.piece_bytes = min(piece_bytes, size) // PAGE_BYTES * PAGE_BYTES
        if not self.piece_bytes:
            self.close()
            raise InvalidInputError(
                f"{path} has {format_bytes(size)}, too little to measure a disk by; name a "
                "larger file, or a directory."
            )
        self._offsets = list(range(0, size - self.piece_bytes + 1, self.piece_bytes))
        # As experts are asked for: here and there. The same order each time.
        random.Random(0).shuffle(self._offsets)
        self._at = 0
        self._lock = threading.Lock()
        if not self._file.direct:
            say(
                f"{path} cannot be read past the page cache, which its file system lacks: what is "
                "measured is the page cache; name a directory on a disk."
            )

    def __repr__(self) -> str:
        return f"<StorageProbe {self._file.path}, {format_bytes(self.piece_bytes)} a read>"

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self._file.path

    def rate(self, seconds: float = 0.5, depth: int = DEPTH) -> float:
        """Bytes per second with ``depth`` reads under way at once; the median of four slices.

        Each slice ends when its last read has. Raises PackError if the disk fails.
        """
        with ThreadPoolExecutor(depth) as pool:
            buffers = [_buffer(self.piece_bytes) for _ in range(depth)]
            rates = []
            for _ in range(_SLICES):
                began = time.perf_counter()
                end = began + seconds / _SLICES
                counts = pool.map(lambda buffer: self._read_until(end, buffer), buffers)  # noqa: B023
                num_bytes = sum(counts)
                rates.append(num_bytes / (time.perf_counter() - began))
            return statistics.median(rates)

    def close(self) -> None:
        """Closes the file, and removes it if it was made; twice is harmless."""
        self._file.close()
        self._remove()

    def _remove(self) -> None:
        if self._made is not None:
            self._made.unlink(missing_ok=True)

    def _read_until(self, end: float, buffer: mmap.mmap) -> int:
        """Reads a piece at least; the bytes that were read."""
        done = 0
        view = memoryview(buffer)[: self.piece_bytes]
        try:
            while True:
                self._file.read_into(view, self._next_offset())
                done += self.piece_bytes
                if time.perf_counter() >= end:
                    return done
        except (OSError, EOFError) as error:
            raise PackError(f"{self._file.path} could not be read: {error}.") from error
        finally:
            view.release()

    def _next_offset(self) -> int:
        with self._lock:
            self._at = (self._at + 1) % len(self._offsets)
            return self._offsets[self._at]


def link_rate(device: Device | None = None, num_bytes: int = _LINK_BYTES) -> float | None:
    """Bytes per second from host memory to the GPU, by the copies that bring experts.

    From registered memory, or staged where the driver refuses that, as a worker would;
    ``num_bytes`` a copy. None without a GPU. ``device``: another than the first.
    """
    if device is None:
        with suppress(DeviceError):
            device = CudaDevice("cuda:0")
            try:
                return link_rate(device, num_bytes)
            finally:
                device.close()
        return None
    size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    source = mmap.mmap(-1, _LINK_COPIES * size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(source)
    address = ctypes.addressof(anchor)
    ctypes.memset(address, 1, _LINK_COPIES * size)
    slots = device.allocate(_LINK_COPIES, size)
    memory = device.register(address, _LINK_COPIES * size)
    rates = []
    try:
        for _ in range(_MIN_TURNS + 1):
            begin = device.clock()
            events = [device.copy(memory, n * size, size, slots[n]) for n in range(_LINK_COPIES)]
            for event in events:
                event.wait()
            rates.append(_LINK_COPIES * size / (device.clock() - begin))
    finally:
        memory.close()
    return statistics.median(rates[1:])  # the first wakes the link up


def gpu_memory(device: Device | None = None) -> int | None:
    """Bytes that are free on the first GPU, or on ``device``; None without one."""
    if device is not None:
        return device.free_bytes()
    with suppress(DeviceError):
        return CudaDevice("cuda:0").free_bytes()
    return None


def gpu_memory_rate(num_bytes: int = 1 << 30) -> float | None:
    """Bytes per second that the first GPU reads from its memory; None without one.

    From copying ``num_bytes`` within it, which reads and writes as many.
    """
    if not torch.cuda.is_available():
        return None
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source)
    rates = []
    for _ in range(_MIN_TURNS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(2 * num_bytes / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def _make_file(directory: Path, num_bytes: int) -> Path:
    """A file of bytes that no disk can compress away, written through to the disk."""
    path = directory / f".expertd-probe-{os.getpid()}-{threading.get_ident()}"
    piece = os.urandom(1 << 20)
    try:
        with path.open("xb") as file:
            for number in range(max(1, num_bytes >> 20)):
                file.write(number.to_bytes(8, "little") + piece[8:])
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise InvalidInputError(
            f"{directory} cannot be written to ({error.strerror}), so its disk cannot be "
            "measured; name another directory, or a pack on that disk."
        ) from error
    return path


def _buffer(num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, max(num_bytes, 2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

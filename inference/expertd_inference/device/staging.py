"""Copies from memory that the driver does not register, by way of a ring of pinned buffers.

The host copies a piece into the next buffer of the ring while the device still copies the ones
before; it waits only when the ring is full. Several threads copy one piece, since one alone reads
memory at a fraction of what the link takes.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from expertd_inference.device.device import Event

BUFFER_BYTES = 8 << 20
"""A power of two: torch's pinned allocations are rounded up to one."""
NUM_BUFFERS = 4
_MIN_SHARE_BYTES = 1 << 20


class StagingRing:
    """``buffers`` are pinned, each ``buffer_bytes`` long, by address.

    ``send(target, source, num_bytes)`` queues a copy from a buffer on the copy stream, ``record``
    gives the event of all that is queued there.
    """

    def __init__(
        self,
        buffers: Sequence[int],
        buffer_bytes: int,
        send: Callable[[int, int, int], None],
        record: Callable[[], Event],
        *,
        num_threads: int = 4,
    ) -> None:
        self._buffers, self._buffer_bytes = tuple(buffers), buffer_bytes
        self._send, self._record = send, record
        self._busy: list[Event | None] = [None] * len(self._buffers)
        self._next = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="staging")
        self._num_threads = num_threads

    def copy(self, target: int, source: int, num_bytes: int) -> Event:
        """Queues the copy; ``source`` has been read when this returns."""
        for start in range(0, num_bytes, self._buffer_bytes):
            size = min(self._buffer_bytes, num_bytes - start)
            place, self._next = self._next, (self._next + 1) % len(self._buffers)
            if (event := self._busy[place]) is not None:
                event.wait()
            self._read(self._buffers[place], source + start, size)
            self._send(target + start, self._buffers[place], size)
            self._busy[place] = self._record()
        return self._busy[self._next - 1] or self._record()

    def close(self) -> None:
        """Ends its threads; a second call does nothing."""
        self._threads.shutdown()

    def _read(self, buffer: int, source: int, size: int) -> None:
        share = max(_MIN_SHARE_BYTES, -(-size // self._num_threads))
        starts = range(0, size, share)
        if len(starts) == 1:
            ctypes.memmove(buffer, source, size)
            return
        # memmove by ctypes does not hold the interpreter's lock.
        jobs = [
            self._threads.submit(
                ctypes.memmove, buffer + start, source + start, min(share, size - start)
            )
            for start in starts
        ]
        for job in wait(jobs).done:
            job.result()

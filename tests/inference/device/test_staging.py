"""The pinned ring: bytes that the device reads later are still there when it does."""

import ctypes
import os

import pytest

from expertd_inference.device.staging import StagingRing
from expertd_testing.fake_cudart import FakeCudart

KIB = 1024


class StreamEvent:
    """After so many copies of the runtime's stream; waiting lets exactly these happen."""

    def __init__(self, runtime: FakeCudart, waited: list[int]) -> None:
        self._runtime, self._waited = runtime, waited
        self._total = runtime.num_queued

    @property
    def done(self) -> bool:
        return self._runtime.num_queued == 0

    def wait(self) -> None:
        self._waited.append(self._total)
        self._runtime.run(1)


@pytest.mark.parametrize(
    "num_bytes",
    [
        100,  # less than a buffer
        4096 * KIB,  # a buffer, which threads share
        3 * 4096 * KIB + 5,  # round the ring, and an end that fills no buffer
    ],
)
def test_a_buffer_is_not_overwritten_before_the_device_has_read_it(num_bytes: int) -> None:
    runtime, waited = FakeCudart(), list[int]()
    size = 4096 * KIB
    memory = [ctypes.create_string_buffer(size) for _ in range(2)]
    ring = StagingRing(
        [ctypes.addressof(buffer) for buffer in memory],
        size,
        lambda target, source, count: _queue(runtime, target, source, count),
        lambda: StreamEvent(runtime, waited),
    )
    source, target = os.urandom(num_bytes), ctypes.create_string_buffer(num_bytes)
    held = ctypes.create_string_buffer(source, num_bytes)
    ring.copy(ctypes.addressof(target), ctypes.addressof(held), num_bytes)
    # The source may change now: it has been read.
    ctypes.memset(held, 0, num_bytes)
    runtime.run()
    assert target.raw == source
    assert len(waited) == max(0, -(-num_bytes // size) - 2)
    ring.close()


def _queue(runtime: FakeCudart, target: int, source: int, count: int) -> None:
    assert runtime.copy_to_device(target, source, count, 0) == 0

"""Peak PSS: of this process, while the block runs."""

import mmap
import os
import time

from expertd_inference.process.memory import PeakPss, pss_bytes

SIZE = 64 << 20


def touch(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    for page in range(0, size, 4096):
        memory[page] = 1
    return memory


def test_a_peak_that_has_passed_counts() -> None:
    before = pss_bytes()
    with PeakPss() as memory:
        with touch(SIZE):
            time.sleep(2.0)
        time.sleep(0.05)
    assert memory.peak_bytes >= before + SIZE * 0.9
    assert pss_bytes() < before + SIZE / 2


def test_the_end_counts() -> None:
    with PeakPss() as memory:
        kept = touch(SIZE)
    assert memory.peak_bytes >= SIZE
    kept.close()


def test_shared_pages_count_in_part() -> None:
    with touch(SIZE):
        alone = pss_bytes()
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            # Maps the same pages (shared anonymous memory), and waits.
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        os.close(read_end)
        together = pss_bytes()
        os.close(write_end)
        os.waitpid(child, 0)
    assert together < alone - SIZE * 0.4

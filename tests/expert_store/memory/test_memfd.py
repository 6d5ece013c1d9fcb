"""Shared memory: fixed in size, and read-only for whom it is handed to."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.memory.memfd import SharedMemory


def test_it_neither_shrinks_nor_grows() -> None:
    memory = SharedMemory("test", 8192, mode=0o600)
    for size in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    memory.close()


def test_readers_see_what_is_written_and_cannot_write() -> None:
    memory = SharedMemory("test", 4096, mode=0o400)
    descriptor = memory.open_read_only()
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, 4096)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
        with mmap.mmap(descriptor, 4096, prot=mmap.PROT_READ) as mapping:
            memory.view[:5] = b"hello"
            assert mapping[:5] == b"hello"
            memory.close()
            assert mapping[:5] == b"hello", "a reader's mapping ends with the writer's"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_the_mode_is_that_of_the_inode(mode: int) -> None:
    memory = SharedMemory("test", 4096, mode=mode)
    assert os.fstat(memory.fd).st_mode & 0o7777 == mode
    memory.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_reopen_nor_chmod_it() -> None:
    memory = SharedMemory("test", 4096, mode=0o400)
    descriptor = memory.open_read_only()
    attempts = f"""
import os
os.setuid(65534)
def refused(attempt):
    try:
        attempt()
    except PermissionError:
        return True
for flags in (os.O_RDONLY, os.O_RDWR):
    assert refused(lambda: os.open("/proc/self/fd/{descriptor}", flags)), flags
assert refused(lambda: os.fchmod({descriptor}, 0o777))
"""
    result = subprocess.run(
        [sys.executable, "-c", attempts], pass_fds=[descriptor], stderr=subprocess.PIPE, check=False
    )
    assert result.returncode == 0, result.stderr.decode()
    os.close(descriptor)
    memory.close()


def test_closing_twice_and_while_a_view_is_in_use() -> None:
    memory = SharedMemory("test", 4096, mode=0o600)
    part = memory.view[10:20]
    part[:] = b"0123456789"
    memory.close()
    memory.close()
    assert bytes(part) == b"0123456789"
    assert memory.fd < 0


def test_nothing_is_left_open_when_it_cannot_be_made() -> None:
    descriptors = _num_descriptors()
    with pytest.raises(ValueError, match="cannot mmap"):
        SharedMemory("test", 0, mode=0o600)
    assert _num_descriptors() == descriptors


def test_adopting_it() -> None:
    memory = SharedMemory("test", 8192, mode=0o400)
    memory.view[:5] = b"bytes"
    adopted = SharedMemory.adopt(os.dup(memory.fd))
    memory.close()
    assert (adopted.num_bytes, bytes(adopted.view[:5])) == (8192, b"bytes")
    adopted.view[:5] = b"still"
    adopted.close()


def test_what_cannot_be_adopted_stays_the_callers() -> None:
    memory = SharedMemory("test", 4096, mode=0o400)
    read_only = memory.open_read_only()
    unsealed, null = os.memfd_create("test"), os.open("/dev/null", os.O_RDWR)
    os.ftruncate(unsealed, 4096)
    descriptors = _num_descriptors()
    for fd in (read_only, unsealed, null):
        with pytest.raises(ValueError, match=r"it is (not sealed|no shared memory)"):
            SharedMemory.adopt(fd)
    assert _num_descriptors() == descriptors
    for fd in (read_only, unsealed, null):
        os.close(fd)
    memory.close()


def _num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))

"""The arena: honest about what the host gave, and refused if the host has not that much."""

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.memory import arena
from expertd.memory.arena import Arena, check_memory
from expertd.memory.extents import Extent
from expertstore.errors import ConfigError, ShortMemoryError

MIB = 1 << 20

_AS_A_USER = """
import os, resource
from expertd.memory.arena import Arena  # that user may be unable to read the package
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setuid(65534)
arena = Arena(1 << 20, lock=True)
print(arena.locked_bytes, *arena.warnings, sep="\\n")
"""


def test_it_is_writable_here_and_read_only_for_others() -> None:
    arena = Arena(MIB + 100, lock=False)
    assert arena.num_bytes == MIB == len(arena.view)
    assert arena.view.readonly
    arena.writable(Extent(MIB - 4096, 4096))[-4:] = b"last"
    descriptor = arena.memory.open_read_only()
    assert os.fstat(descriptor).st_mode & 0o777 == 0o400
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, MIB)
    with mmap.mmap(descriptor, MIB, prot=mmap.PROT_READ) as mapping:
        os.close(descriptor)
        arena.close()
        arena.close()
        assert mapping[-4:] == b"last", "a worker's mapping ends with the daemon's"


def test_closing_gives_the_memory_back() -> None:
    gc.collect()  # other tests' arenas, which views may have kept
    before = _num_mappings()
    arena = Arena(8 * MIB, lock=False)
    assert _shared_bytes() >= 8 * MIB
    assert _num_mappings() == before + 1
    arena.close()
    assert _num_mappings() == before


def test_nothing_is_locked_unless_asked() -> None:
    arena = Arena(MIB, lock=False)
    assert arena.locked_bytes == 0
    assert not any("locked" in warning for warning in arena.warnings)
    arena.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without CAP_IPC_LOCK")
def test_what_cannot_be_locked_is_said() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _AS_A_USER], capture_output=True, text=True, check=True
    )
    locked, *warnings = result.stdout.splitlines()
    assert locked == "0"
    assert any(
        "not locked" in warning and "64.0 KiB" in warning and "raise LimitMEMLOCK" in warning
        for warning in warnings
    ), warnings


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock as much as it likes")
def test_what_is_locked_is_counted() -> None:
    arena = Arena(MIB, lock=True)
    if not arena.locked_bytes:
        pytest.skip("this container has no CAP_IPC_LOCK")
    assert arena.locked_bytes == MIB
    assert _locked_bytes() >= MIB
    arena.close()


def test_missing_huge_pages_are_said() -> None:
    arena = Arena(MIB, lock=False)  # smaller than a huge page
    assert arena.huge_page_bytes == 0
    assert any("shmem_enabled" in warning for warning in arena.warnings)
    arena.close()


def test_more_than_the_host_has_is_refused() -> None:
    # So much that it cannot even be mapped: nobody is killed for want of memory here.
    with pytest.raises(ConfigError, match=r"budget is .* only .* smaller --ram") as refused:
        Arena(1 << 55, lock=False)
    assert not isinstance(refused.value, ShortMemoryError)


def test_more_than_is_free_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "memory_available", lambda: MIB)
    check_memory(MIB)
    with pytest.raises(ShortMemoryError, match=r"only 1\.0 MiB are free.* smaller --ram"):
        check_memory(MIB + 1)


def _num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:expertd-arena")


def _shared_bytes() -> int:
    return _status("RssShmem")


def _locked_bytes() -> int:
    return _status("VmLck")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)

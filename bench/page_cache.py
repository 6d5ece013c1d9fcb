"""What the system's page cache holds of a file."""

import os
from pathlib import Path


def forget_file(path: Path) -> None:
    """Has the page cache give up what it holds of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def write_out(directory: Path) -> None:
    """Waits until the disk has every file of a directory: only these, since others may write."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def fill_with_file(path: Path) -> None:
    """Has it hold all of a file."""
    with path.open("rb", buffering=0) as file:
        while file.read(16 << 20):
            pass

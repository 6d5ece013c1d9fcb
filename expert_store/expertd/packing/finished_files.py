"""Files that are complete: on the disk for certain, and by what they are recognized."""

import os
from pathlib import Path

from xxhash import xxh3_64

_CHUNK_BYTES = 1 << 20


def flush(path: Path) -> None:
    """Waits until a file or directory is on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_checksum(path: Path) -> str:
    """XXH3-64 in hex. Raises OSError."""
    state = xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()

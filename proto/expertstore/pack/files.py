"""Opening what a pack consists of, and nothing that only has the name of it."""

import errno
import os
import stat
from pathlib import Path

from expertstore.errors import PackError


def check_path(path: Path) -> None:
    """Raises :class:`PackError` unless messages, which are UTF-8, can carry ``path``."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PackError(
            f"the path {str(path)!r} is not UTF-8, which workers could not be told; rename it."
        ) from None


def open_regular(path: Path, flags: int = 0) -> int:
    """A descriptor of the regular file ``path``, for reading. Raises OSError.

    Of anything else, a FIFO would be waited for, a device read without end, and a directory
    fail only when the first record is wanted.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer; files know no such waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except ValueError as error:  # a zero byte in the path
        raise OSError(errno.ENOENT, str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENODEV, "it is not a regular file")
    return descriptor

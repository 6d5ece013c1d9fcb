"""The ways to read a pack from disk."""

from enum import StrEnum

from expertstore.errors import ConfigError


class DiskIo(StrEnum):
    """How records are read."""

    AUTO = "auto"
    """As is measured to be faster when the pack is loaded."""
    DIRECT = "direct"
    """Past the page cache, where the file system can."""
    MMAP = "mmap"
    """From mapped files, by way of the page cache."""


def parse_disk_io(text: str) -> DiskIo:
    """Raises :class:`ConfigError`."""
    if text not in list(DiskIo):
        raise ConfigError(f"{text!r} is no way to read a pack; disk_io is {', '.join(DiskIo)}.")
    return DiskIo(text)

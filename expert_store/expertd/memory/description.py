"""What a directory says of itself, behind its entries: all that the next daemon needs of it.

The length of a JSON text and its XXH3-64, as little-endian 64-bit words, then the text. It is
written before the directory's descriptor is put into the fd store, so that wherever a daemon
is killed, there is a whole model or none.
"""

import struct
from enum import StrEnum

import msgspec
from xxhash import xxh3_64_intdigest

from expertd.memory.memfd import SharedMemory
from expertd.settings.disk_io import DiskIo
from expertd.settings.limits import NO_LIMITS, ModelLimits
from expertstore.errors import ConfigError
from expertstore.shared.directory import PAGE_BYTES, Directory, DirectoryView, directory_bytes

_HEAD = struct.Struct("<QQ")


class Origin(StrEnum):
    """Who asked for a model."""

    CONFIG = "config"
    """The configuration: it goes when it is no longer named there."""
    ADMIN = "admin"
    """An administrator, at run time: it stays until it is unloaded."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """Which model of which pack the words are of, and in which arena the records lie."""

    name: str
    pack: str
    """The pack's directory, absolute."""
    fingerprint: str
    arena: int
    origin: Origin
    limits: ModelLimits = NO_LIMITS
    """Those that it was loaded with; changes at run time last as long as the daemon."""
    disk_io: DiskIo | None = None
    """How it is to be read; None: as the configuration says."""


def new_directory(num_entries: int, description: Description) -> SharedMemory:
    """An empty directory of ``num_entries``, described."""
    text = msgspec.json.encode(description)
    start = directory_bytes(num_entries)
    end = start + _HEAD.size + len(text)
    memory = SharedMemory("expertd-directory", -(-end // PAGE_BYTES) * PAGE_BYTES, 0o400)
    Directory.format(memory.view.cast("Q"), num_entries)
    _HEAD.pack_into(memory.view, start, len(text), xxh3_64_intdigest(text))
    memory.view[start + _HEAD.size : end] = text
    return memory


def read_description(memory: SharedMemory) -> Description:
    """Of a directory that was formatted. Raises ValueError if anything in it is damaged."""
    if memory.num_bytes % PAGE_BYTES:
        raise ValueError("it is not made of whole pages")
    num_entries = DirectoryView(memory.view.cast("Q")).num_entries
    start = directory_bytes(num_entries)
    if start + _HEAD.size > memory.num_bytes:
        raise ValueError("it has more entries than room for them")
    length, checksum = _HEAD.unpack_from(memory.view, start)
    start += _HEAD.size
    if length > memory.num_bytes - start:
        raise ValueError("its description is longer than it")
    text = bytes(memory.view[start : start + length])
    if xxh3_64_intdigest(text) != checksum:
        raise ValueError("the checksum of its description does not match")
    try:
        return msgspec.json.decode(text, type=Description)
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ValueError(f"its description makes no sense ({error})") from error

"""The daemon's side of one session's shared memory, without a daemon."""

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from expertd_client.mapping import Mapping
from expertstore.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer
from expertstore.shared.directory import Directory, directory_bytes, pack_word
from expertstore.shared.greeting import Greeting
from expertstore.shared.handshake import Welcome
from expertstore.shared.session_page import SessionPage, session_page_bytes

PAGE = 4096
ARENA_PAGES = 64


@dataclass
class SharedMemory:
    """``arena`` and ``directory`` as the daemon writes them, ``page`` as it reads it.

    ``trailer`` is the arena's; a session begun now is of its adoption.
    """

    arena: mmap.mmap
    directory: Directory
    page: SessionPage
    trailer: ArenaTrailer
    descriptors: list[int]
    sizes: dict[str, int]

    def mapping(self) -> Mapping:
        """A worker's mapping of it."""
        return Mapping.map(self.descriptors, adoption=self.trailer.adoptions, **self.sizes)

    def greeting(self) -> tuple[Greeting, socket.socket]:
        """A greeting as after a handshake, and the daemon's end of its connection."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        welcome = Welcome(session=7, token="t", incarnation="i", **self.sizes)
        return Greeting(welcome, ours, [os.dup(fd) for fd in self.descriptors]), theirs

    def publish(self, entry: int, page: int, generation: int = 1) -> None:
        """Makes a record resident."""
        self.directory.publish(entry, pack_word(page * PAGE, generation))

    def evict(self, entry: int) -> int:
        """D1 and D2; the epoch that sessions must reach before the bytes are used again."""
        self.directory.withdraw(entry)
        return self.directory.advance_epoch()


@contextlib.contextmanager
def shared_memory(num_entries: int = 16) -> Iterator[SharedMemory]:
    """Arena, directory and page in fresh memfds."""
    sizes = {
        "arena_bytes": ARENA_PAGES * PAGE,
        "directory_bytes": directory_bytes(num_entries),
        "page_bytes": session_page_bytes(),
    }
    descriptors, maps = [], []
    for name, size in sizes.items():
        descriptor = os.memfd_create(name)
        size += TRAILER_BYTES if name == "arena_bytes" else 0
        os.ftruncate(descriptor, size)
        descriptors.append(descriptor)
        maps.append(mmap.mmap(descriptor, size))
    directory = Directory.format(memoryview(maps[1]).cast("Q"), num_entries)
    page = SessionPage.format(memoryview(maps[2]), directory.epoch)
    trailer = ArenaTrailer.format(memoryview(maps[0])[-TRAILER_BYTES:].cast("Q"))
    yield SharedMemory(maps[0], directory, page, trailer, descriptors, sizes)
    for descriptor in descriptors:
        os.close(descriptor)

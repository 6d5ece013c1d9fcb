"""What a server and its daemon hold when nobody asks anything."""

import os
from dataclasses import dataclass
from pathlib import Path

from expertd_client import Client
from expertd_testing.server import Server
from tests.campaign.process import Holdings, holdings


@dataclass(frozen=True)
class Stock:
    """At one moment, with one engine and no request."""

    server: Holdings
    daemon: Holdings
    num_sessions: int
    """At the daemon, of workers."""
    num_processes: int
    """That the server has started and that are there, zombies included."""
    files: tuple[str, ...]
    """In the directories for temporary files and for shared memory."""

    def left_since(self, first: "Stock") -> dict[str, tuple[int, int]]:
        """What there is more of than there was."""
        counts = {
            "descriptors of the server": (first.server.num_files, self.server.num_files),
            "threads of the server": (first.server.num_threads, self.server.num_threads),
            "shared mappings of the server": (
                first.server.num_mappings,
                self.server.num_mappings,
            ),
            "processes": (first.num_processes, self.num_processes),
            "sessions": (first.num_sessions, self.num_sessions),
            "files": (len(first.files), len(self.files)),
        }
        return {name: pair for name, pair in counts.items() if pair[1] > pair[0]}

    def left_at_the_daemon(self, first: "Stock") -> dict[str, tuple[int, int]]:
        """The same of the daemon, if it is the one that it was."""
        counts = {
            "descriptors of the daemon": (first.daemon.num_files, self.daemon.num_files),
            "shared mappings of the daemon": (
                first.daemon.num_mappings,
                self.daemon.num_mappings,
            ),
            # Its arena may not have been full before; a session left behind would be a page each.
            "shared 64 KiB of the daemon": (
                -(-first.daemon.shared_bytes >> 16),
                self.daemon.shared_bytes >> 16,
            ),
        }
        return {name: pair for name, pair in counts.items() if pair[1] > pair[0]}


def take_stock(server: Server, daemon_pid: int, sockets: Path, temporary: Path) -> Stock:
    """Now."""
    with Client(sockets, timeout_seconds=10) as store:
        sessions = [each for each in store.stats()["sessions"] if each["model"]]
    files = [*temporary.iterdir(), *Path("/dev/shm").glob(f"*{os.getuid()}*")]
    return Stock(
        holdings(server.pid),
        holdings(daemon_pid),
        len(sessions),
        len(server.descendants),
        tuple(sorted(map(str, files))),
    )

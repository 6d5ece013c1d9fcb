"""A model's files on a hub, whichever hub it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from expertd.hub.reference import HubReference


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    name: str
    """Its path in the repository."""
    num_bytes: int
    sha256: str = ""
    """Of the content, in hexadecimal; empty if the hub does not tell it, as of small files."""


class Repository(Protocol):
    """One commit of a repository. Methods raise :class:`~expertstore.errors.CheckpointError`."""

    reference: HubReference
    commit: str
    """What the reference's revision stood for when it was opened."""
    files: Mapping[str, HubFile]
    """By name."""

    def cached(self, name: str) -> Path | None:
        """The file in the hub's own cache on this host, if it is there."""

    def read(self, name: str, offset: int, count: int) -> bytes:
        """``count`` bytes of the file, or fewer at its end."""

    def download(self, name: str, folder: Path | None, on_bytes: Callable[[int], None]) -> Path:
        """Fetches the file into ``folder``, and goes on with what an earlier call left there.

        Without ``folder`` it is the hub's cache on this host.

        ``on_bytes`` gets how many bytes came, again and again; what was there counts too. The
        content is what ``files`` says it is.
        """

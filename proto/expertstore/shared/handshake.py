"""The messages of the attach socket, one SOCK_SEQPACKET packet each; in JSON until it attaches.

The worker sends one :class:`Hello`; the daemon answers with one :class:`Welcome` (with
the descriptors of arena, directory and session page, in this order, for a worker) or
one :class:`Refusal`. From then on the connection is the session's lease: the daemon
sends :data:`NUDGE` packets when it waits for the session to publish its epoch, a
worker sends hints (:func:`encode_hint`), and when either side closes the session is over.
"""

import os
import struct
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote

import msgspec

from expertstore.errors import InvalidInputError

PROTOCOL_VERSION = 4
MAX_PACKET_BYTES = 4096
NUDGE = b"N"
HINT = b"H"
MAX_HINTED = MAX_PACKET_BYTES // 4 - 1
"""Experts in one hint; the least likely of a longer one are left out."""
MAX_SOCKET_PATH_BYTES = 107
"""struct sockaddr_un's path without its final zero."""
ATTACH_SOCKET = "attach.sock"
RPC_SOCKET = "rpc.sock"
TOKEN_KEY = "expertd-token"
INCARNATION_KEY = "expertd-incarnation"
ERROR_DETAIL_KEY = "expertd-error-bin"


def socket_path(directory: Path, name: str) -> Path:
    """The socket of that name. Raises InvalidInputError if no socket there can have a name."""
    longest = os.fsencode(directory / ATTACH_SOCKET)
    if len(longest) > MAX_SOCKET_PATH_BYTES:
        raise InvalidInputError(
            f"The path {directory / ATTACH_SOCKET} has {len(longest)} bytes and a Unix socket's at "
            f"most {MAX_SOCKET_PATH_BYTES}; serve in a directory with a shorter path."
        )
    if b"\0" in longest:
        raise InvalidInputError(f"The path {str(directory)!r} has a zero byte, which no file may.")
    return directory / name


def rpc_target(directory: Path) -> str:
    """The gRPC address of the daemon in ``directory``, which is absolute.

    Raises InvalidInputError as :func:`socket_path`.
    """
    # gRPC percent-decodes it.
    return "unix:" + quote(os.fsencode(socket_path(directory, RPC_SOCKET)))


class Role(StrEnum):
    """What a session is for."""

    WORKER = "worker"
    """Maps the arena and computes from it."""
    READER = "reader"
    """Reads records by RPC, without shared memory."""
    ADMIN = "admin"
    """Loads and unloads models; the daemon's own user or root only."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker says first."""

    protocol: int
    role: Role
    model: str = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome", kw_only=True):
    """The daemon's answer to a session that it accepts; sizes in bytes.

    ``arena_bytes`` is that of the records, without the trailer page behind them.
    """

    session: int
    token: str
    incarnation: str
    arena_bytes: int = 0
    directory_bytes: int = 0
    page_bytes: int = 0
    adoption: int = 0
    """Which of the daemons that the arena has had; see :mod:`expertstore.shared.arena_trailer`."""
    annex_bytes: int = 0
    """How much of its own memory a worker uses at most for records that have no slot."""


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """The daemon's answer to one that it refuses; ``code`` names a gRPC status."""

    code: str
    message: str


def encode_hint(entries: Sequence[int], needed: Sequence[int] = ()) -> bytes:
    """A worker's packet that says which directory entries it wants next, likeliest first.

    ``needed``: what it is about to fetch. The packet takes the place of the one before. No answer
    comes: what is sent costs a system call.
    """
    needed = needed[:MAX_HINTED]
    both = [*needed, *entries][:MAX_HINTED]
    return struct.pack(f"<2sH{len(both)}I", HINT, len(needed), *both)


def decode_hint(packet: bytes) -> tuple[Sequence[int], Sequence[int]]:
    """The entries in such a packet, and those that are needed. Raises ValueError if it is none."""
    count, odd = divmod(len(packet) - 4, 4)
    if odd or not 0 <= count <= MAX_HINTED:
        raise ValueError("this is not a hint")
    kind, num_needed, *both = struct.unpack(f"<2sH{count}I", packet)
    if kind != HINT.ljust(2, b"\0") or num_needed > count:
        raise ValueError("this is not a hint")
    return both[num_needed:], both[:num_needed]

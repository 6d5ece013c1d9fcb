"""Who may attach: root, the daemon's user, and the users and groups that the settings name."""

import ctypes
import grp
import os
import socket
import struct
from collections.abc import Iterable

from expertstore.errors import ConfigError

_SO_PEERGROUPS = 59  # Linux 4.13; Python has no name for it
_MAX_GROUPS = 65536  # NGROUPS_MAX
_PEER = struct.Struct("3i")
_libc = ctypes.CDLL(None, use_errno=True)


class AllowList:
    """Made of ``allowed_uids`` and ``allowed_groups``; each of these a name or a gid.

    Raises :class:`ConfigError` if there is no group of some name.
    """

    def __init__(self, uids: Iterable[int] = (), groups: Iterable[str | int] = ()) -> None:
        self._uids = {0, os.geteuid(), *uids}
        self._gids = {_gid(group): str(group) for group in groups}

    def __repr__(self) -> str:
        return f"AllowList(uids {sorted(self._uids)}, gids {sorted(self._gids)})"

    def admits(self, peer: socket.socket) -> bool:
        """Whether the process at the other end of a Unix socket may attach.

        As it was when it connected; the kernel says so, not the peer.
        """
        _, uid, gid = peer_of(peer)
        if uid in self._uids or gid in self._gids:
            return True
        return bool(self._gids) and not self._gids.keys().isdisjoint(_supplementary(peer))

    @property
    def remedy(self) -> str:
        """What helps one who is not admitted."""
        if not self._gids:
            return "add it to allowed_uids or one of its groups to allowed_groups"
        names = " or ".join(self._gids.values())
        return f"let its user join the group {names} and log in again, or add it to allowed_uids"


def peer_of(peer: socket.socket) -> tuple[int, int, int]:
    """The pid, uid and primary gid of the process that connected, as this one's namespaces see it.

    A pid of 0 is one that they do not see.
    """
    pid, uid, gid = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid, gid


def _supplementary(peer: socket.socket) -> list[int]:
    # Not getsockopt of Python, which has room for 256 groups.
    gids = (ctypes.c_uint32 * _MAX_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(gids))
    failed = _libc.getsockopt(
        peer.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, gids, ctypes.byref(size)
    )
    return [] if failed else gids[: size.value // ctypes.sizeof(ctypes.c_uint32)]


def _gid(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            f"allowed_groups names {group!r}, and this host has no such group; make it with "
            f"`groupadd --system {group}`, or take it out."
        ) from None

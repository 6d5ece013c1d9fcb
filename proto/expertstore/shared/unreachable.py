"""Why no daemon of this host can be reached in its directory, in one sentence with what to do.

The attach socket tells it by the error of its connect; gRPC, which speaks of subchannels, does
not, so its socket is tried once more by hand.
"""

import errno
import grp
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from expertstore.errors import (
    ExpertdError,
    InvalidInputError,
    PermissionDeniedError,
    PreconditionError,
    UnavailableError,
)
from expertstore.shared.handshake import ATTACH_SOCKET, RPC_SOCKET
from expertstore.socket_directory import how_to_start

UNIT_DIRECTORIES = tuple(
    Path(f"{prefix}/systemd/system") for prefix in ("/etc", "/run", "/usr/local/lib", "/usr/lib")
)
"""Where systemd looks for units."""


class ForbiddenSocketError(PermissionDeniedError):
    """The file system does not let this process connect; nobody has answered."""


def connect_error(error: OSError, path: Path) -> ExpertdError:
    """The exception for a connect to the socket at ``path`` that failed with ``error``."""
    path = path.absolute()
    if error.errno in (errno.EACCES, errno.EPERM):
        return _forbidden(path)
    if error.errno == errno.ELOOP:
        return InvalidInputError(
            f"The links of {path.parent} lead round in a circle; give the directory that "
            "`expertd serve --socket` was given."
        )
    if error.errno == errno.ENOTDIR:
        return InvalidInputError(
            f"{_no_directory(path)} is not a directory; give the one that `expertd serve --socket` "
            "was given."
        )
    if error.errno in (errno.EPROTOTYPE, errno.ENOTSOCK) or _is_no_socket(path):
        return PreconditionError(
            f"{path} is not expertd's; give the directory that `expertd serve --socket` was given."
        )
    if error.errno == errno.ENOENT:
        reason = "no socket in it" if path.parent.exists() else "there is no such directory"
        return _no_answer(path.parent, reason)
    if error.errno == errno.ECONNREFUSED:
        return _no_answer(
            path.parent, "connection refused: the daemon that made its sockets has ended"
        )
    return UnavailableError(f"No connection to {path} can be made: {error.strerror}.")


def explain(directory: Path) -> ExpertdError | None:
    """Why no call reaches the daemon in ``directory``; None if one answers there now."""
    path = directory / RPC_SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            connection.connect(os.fsencode(path))
    except BlockingIOError:
        return None  # many others wait for it, too
    except OSError as error:
        return connect_error(error, path)
    return None


def silent_listener(directory: Path, happened: str) -> str | None:
    """The sentence about an attach socket that a service manager holds; None if a daemon serves.

    The manager listens while the daemon starts or fails to. ``happened``: how the connection ended.
    """
    if explain(directory) is None:
        return None
    advice = _look_at_unit(directory) or "the log of the service that it belongs to says which"
    return (
        f"{directory / ATTACH_SOCKET} {happened}: a service manager listens on it, and expertd "
        f"itself is still starting or fails to; {advice}."
    )


def _no_answer(directory: Path, reason: str) -> UnavailableError:
    advice = _look_at_unit(directory) or how_to_start(directory)
    return UnavailableError(f"No expertd answers at {directory} ({reason}); {advice}.")


def _look_at_unit(directory: Path) -> str | None:
    """The advice for a directory of a systemd unit of this host; None for any other."""
    for place in UNIT_DIRECTORIES:
        try:
            for unit in place.glob("expertd*.socket"):
                if f"={directory / ATTACH_SOCKET}\n" in unit.read_text():
                    name = f"{unit.stem}.service"
                    return f"`systemctl status {name}` and `journalctl -u {name}` say why"
        except OSError:
            continue
    return None


def _forbidden(path: Path) -> ForbiddenSocketError:
    """Names the first directory on the way that may not be entered, or else the socket."""
    ways = reversed(path.parents)
    closed = next((way for way in ways if not os.access(way, os.X_OK, effective_ids=True)), None)
    verb, needed = ("connect to", stat.S_IWGRP) if closed is None else ("enter", stat.S_IXGRP)
    advice = "its permissions let its owner alone"
    with suppress(OSError):  # a daemon that starts has just replaced it
        found = (closed or path).stat()
        if found.st_mode & needed:
            advice = f"join the group that it belongs to, {_group(found.st_gid)}, and log in again"
    return ForbiddenSocketError(f"User {os.geteuid()} may not {verb} {closed or path}; {advice}.")


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _no_directory(path: Path) -> Path:
    """The part of the way that is something else."""
    return next((way for way in reversed(path.parents) if not way.is_dir()), path.parent)


def _is_no_socket(path: Path) -> bool:
    try:
        return not stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False

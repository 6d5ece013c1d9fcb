"""The directory that a daemon serves in, where nobody names one.

A user whose login has a runtime directory has a place there of their own; root, services and
everybody else have the host's. ``expertd serve`` takes the first of :func:`socket_directories`;
each client takes the first in which a daemon is.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from expertstore.command_line import command
from expertstore.shared.handshake import ATTACH_SOCKET, MAX_SOCKET_PATH_BYTES, RPC_SOCKET

HOST_DIRECTORY = Path("/run/expertd")
RUNTIME_VARIABLE = "XDG_RUNTIME_DIR"


def socket_directories(
    environment: Mapping[str, str] = os.environ, uid: int | None = None
) -> list[Path]:
    """Where user ``uid`` (by default this process's) serves and looks, the first choice first."""
    uid = os.geteuid() if uid is None else uid
    runtime = Path(environment.get(RUNTIME_VARIABLE, ""))
    if uid and _is_usable(runtime, uid):
        return [runtime / "expertd", HOST_DIRECTORY]
    return [HOST_DIRECTORY]


def find_daemon() -> Path:
    """The first directory in which a daemon answers, else the first in which one may come.

    Where there is none, it is the one that ``expertd serve`` would take.
    """
    directories = socket_directories()
    for holds_daemon in (_answers, _is_held):
        for directory in directories:
            if holds_daemon(directory):
                return directory
    return directories[0]


def how_to_start(directory: str | Path) -> str:
    """What to type to have a daemon in ``directory``, as the end of a sentence."""
    default = str(directory) == str(socket_directories()[0])
    where = where_to_serve() if default else ("--socket", Path(directory))
    serve = command("expertd", "serve", *where, "--ram", "SIZE", "--model", "NAME=PACK")
    return f"start one with `{serve}`, or give the --socket of one that runs"


def where_to_serve() -> tuple[str | Path, ...]:
    """The option to propose with ``expertd serve``: none where the default directory will do."""
    return () if may_serve(socket_directories()[0]) else ("--socket", own_directory())


def may_serve(directory: Path) -> bool:
    """Whether this user may make sockets in it, or make it in the nearest directory that exists."""
    if len(os.fsencode(directory / ATTACH_SOCKET)) > MAX_SOCKET_PATH_BYTES:
        return False
    there = directory.absolute()
    while not os.path.lexists(there):
        there = there.parent
    return os.access(there, os.W_OK | os.X_OK)


def own_directory() -> Path:
    """A directory that this user can surely serve in, to be proposed: in the home, or in /tmp."""
    home = Path(os.environ.get("HOME", ""))
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return home / ".expertd"
    return Path(f"/tmp/expertd-{os.geteuid()}")


def _is_usable(runtime: Path, uid: int) -> bool:
    """Whether it is this user's: after ``su`` the variable may still name another's."""
    try:
        return runtime.is_absolute() and runtime.is_dir() and runtime.stat().st_uid == uid
    except OSError:
        return False


def _answers(directory: Path) -> bool:
    # Not the attach socket: to connect there starts a service that is stopped.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(directory / RPC_SOCKET))
        except BlockingIOError:  # its backlog is full
            return True
        except OSError:
            return False
    return True


def _is_held(directory: Path) -> bool:
    """Whether a socket lies there, of a daemon to come, or this user may not look."""
    try:
        os.lstat(directory / ATTACH_SOCKET)
    except PermissionError:
        return True
    except OSError:
        return False
    return True

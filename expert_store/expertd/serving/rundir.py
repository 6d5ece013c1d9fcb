"""The daemon's directory: its sockets, and the lock that says whose they are."""

import fcntl
import os
from pathlib import Path

from expertstore.command_line import command
from expertstore.errors import ConfigError
from expertstore.shared.handshake import ATTACH_SOCKET, MAX_SOCKET_PATH_BYTES, RPC_SOCKET
from expertstore.socket_directory import own_directory

LOCK_NAME = "lock"


class RunDirectory:
    """Owns ``path`` until it is closed. Raises :class:`ConfigError` if another daemon does.

    The lock dies with its process, so what a killed daemon left behind is known to be stale
    and is taken over. Made if missing, for its owner and group.

    ``keeps_attach_socket``: that socket is the service manager's, who listens while we are away.
    """

    def __init__(self, path: Path, *, keeps_attach_socket: bool = False) -> None:
        self.path = path.absolute()
        self._keeps_attach_socket = keeps_attach_socket
        self.attach_socket = self.path / ATTACH_SOCKET
        self.rpc_socket = self.path / RPC_SOCKET
        if len(os.fsencode(self.attach_socket)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"the socket directory {self.path} has too long a name for a Unix socket; "
                "give a shorter --socket."
            )
        try:
            self.path.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = os.open(
                self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640
            )
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise ConfigError(
                f"another expertd (pid {owner}) serves at {self.path}; stop it or give another "
                "--socket."
            ) from None
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            self._remove_sockets()
        except OSError as error:
            os.close(self._lock)
            raise self._unusable(error) from error

    def close(self) -> None:
        """Removes the sockets and gives the directory up. Twice is harmless."""
        if self._lock < 0:
            return
        self._remove_sockets()
        os.close(self._lock)
        self._lock = -1

    def _unusable(self, error: OSError) -> ConfigError:
        if isinstance(error, PermissionError):
            option = command("--socket", own_directory())
            return ConfigError(
                f"the socket directory {self.path} cannot be used: {error.strerror}; user "
                f"{os.geteuid()} may serve in a directory of its own: give `{option}` here and to "
                "every other command."
            )
        return ConfigError(f"the socket directory {self.path} cannot be used: {error.strerror}.")

    def _remove_sockets(self) -> None:
        if not self._keeps_attach_socket:
            self.attach_socket.unlink(missing_ok=True)
        self.rpc_socket.unlink(missing_ok=True)

"""A daemon of one's own: started in a child process, gone with this one.

The child watches a pipe whose other end only this process holds. However this process
ends, SIGKILL included, the pipe closes and the child stops (:mod:`.embedded_child`). A
parent-death signal would not do: it fires when the *thread* that started the child ends.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from expertd.manager.systemd import VARIABLES
from expertd.settings.config import name_of_pack
from expertstore.closing import Closing
from expertstore.errors import UnavailableError
from expertstore.pack.manifest import read_manifest
from expertstore.shared.handshake import ATTACH_SOCKET, MAX_SOCKET_PATH_BYTES
from expertstore.shared.host_memory import default_ram_bytes

START_SECONDS = 60.0
STOP_SECONDS = 15.0
READY_PREFIX = "expertd"
"""How the line begins that the daemon prints once it serves."""


class EmbeddedDaemon(Closing):
    """Serves the pack in directory ``pack`` on a private socket while the block runs.

    ``ram`` is the budget, as for ``expertd serve``; by default all experts, or half of the
    available memory if that is less. ``socket`` is the directory to attach in, ``name`` the
    model's name there. Raises PackError if it is no pack, UnavailableError with the
    daemon's own words if it does not start. Closing twice is harmless.
    """

    def __init__(self, pack: str | Path, *, ram: str | int | None = None) -> None:
        self.pack = Path(pack).resolve()
        self.name = name_of_pack(self.pack)
        manifest = read_manifest(self.pack).manifest
        self._budget = str(ram if ram is not None else default_ram_bytes(manifest))
        self._directory = _socket_directory()
        self.socket = self._directory / "s"
        self._process: subprocess.Popen[str] | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the daemon."""
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """Stops the daemon and removes its directory."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "expertd_inference.process.embedded_child",
            str(self._directory),
        ]
        command += ["serve", "--socket", str(self.socket), "--ram", self._budget]
        command += ["--model", f"{self.name}={self.pack}"]
        with ExitStack() as stack:
            try:
                # A file: nobody has to drain it, and it outlives the child.
                log = stack.enter_context(tempfile.TemporaryFile(dir=self._directory))
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    errors="replace",
                    # A worker that is a service itself must not have its manager hear this one.
                    env={key: value for key, value in os.environ.items() if key not in VARIABLES},
                    # Ctrl-C is for the worker, which then stops the daemon.
                    start_new_session=True,
                )
            except OSError as error:
                raise UnavailableError(
                    f"The embedded daemon cannot be started by {sys.executable or 'no Python'}: "
                    f"{error.strerror}; {_advice(error)}."
                ) from error
            if not self._wait_ready():
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()
                reason = said[-1].strip() if said else "it said nothing."
                raise UnavailableError(
                    f"The embedded daemon did not start: {reason.removeprefix('expertd: ')}"
                )

    def _wait_ready(self) -> bool:
        """Whether the daemon said that it serves, before it ended or the time was over."""
        assert self._process is not None
        assert self._process.stdout is not None
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        try:
            return any(line.startswith(READY_PREFIX) for line in self._process.stdout)
        finally:
            timer.cancel()


def _socket_directory() -> Path:
    """A new private directory, short enough for a Unix socket. Raises UnavailableError."""
    wanted = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"]
    reason = "none of them is short enough"
    for parent in filter(None, wanted):
        longest = os.fsencode(Path(parent) / f"expertd-{'x' * 8}" / "s" / ATTACH_SOCKET)
        if len(longest) > MAX_SOCKET_PATH_BYTES:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="expertd-", dir=parent))
        except OSError as error:
            reason = str(error)
    raise UnavailableError(
        f"There is no room for an embedded daemon's socket in {', '.join(filter(None, wanted))} "
        f"({reason}); set TMPDIR to a directory with a short path where this user may write."
    )


def _advice(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return "end other processes, or raise the limit of processes (ulimit -u)"
    return "run a daemon by `expertd serve`, and leave out --embedded"

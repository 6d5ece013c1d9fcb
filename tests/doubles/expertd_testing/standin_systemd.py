"""A stand-in for systemd, for tests and demonstrations on machines that run something else.

Of what systemd does for one service it does, faithfully, what expertd relies on: the notify
socket (only the main process is heard), the fd store (names, limit, no descriptor twice),
barriers, the watchdog (SIGABRT, then SIGKILL), socket activation, and restarts, with the
descriptors numbered from 3. It is a fake: no cgroups, no sandbox, no dependencies.

    with StandInSystemd(["expertd", "serve", ...], attach_path=path) as systemd:
        systemd.wait_ready()
        systemd.kill()                  # the service fails, and is started again
        systemd.wait_ready(starts=2)
"""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd.manager.systemd import ATTACH_NAME, FIRST_DESCRIPTOR

_POLL_SECONDS = 0.005
_ABORT_SECONDS = 2.0
_MAX_DESCRIPTORS = 64
_HIGH = 512  # above what is handed down, so that nothing is overwritten before it is copied
_CREDENTIALS = struct.Struct("3i")
# The shell becomes the service, so its process id is the one that the service will have.
_EXEC = 'LISTEN_PID=$$ WATCHDOG_PID=$$; export LISTEN_PID WATCHDOG_PID; exec "$0" "$@"'


@dataclass
class Run:
    """One process of the service, from its start to its end."""

    pid: int
    ready: bool = False
    stopping: bool = False
    statuses: list[str] = field(default_factory=list)
    num_alive: int = 0
    """How often it has fed the watchdog."""
    fed_at: float = field(default_factory=time.monotonic)
    exit_status: int | None = None
    """As ``os.waitstatus_to_exitcode`` gives it: -9 for one that was killed."""
    timed_out: bool = False
    """Whether the watchdog ended it."""

    @property
    def status(self) -> str:
        """The last that it said of itself."""
        return self.statuses[-1] if self.statuses else ""


class StandInSystemd:
    """Starts ``command`` as a service and, when it fails, again (``Restart=on-failure``).

    ``attach_path``: a socket unit listens there and passes the socket as ``attach``.
    ``max_stored``: FileDescriptorStoreMax. ``watchdog_seconds``: WatchdogSec.
    ``restarts``: False is Restart=no. ``says_max``: tells its room for descriptors, as systemd
    does from version 254 on.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        attach_path: Path | None = None,
        max_stored: int = 64,
        watchdog_seconds: float | None = None,
        restarts: bool = True,
        restart_seconds: float = 0.02,
        environment: Mapping[str, str] | None = None,
        says_max: bool = True,
    ) -> None:
        self.command = list(command)
        self.max_stored = max_stored
        self.watchdog_seconds = watchdog_seconds
        self.runs: list[Run] = []
        self._environment = {**os.environ, **(environment or {})}
        self._says_max = says_max
        self._restarts = restarts
        self._restart_seconds = restart_seconds
        self._stored: list[tuple[str, int]] = []
        self._lock = threading.RLock()
        self._wanted = True
        self._once_more = False
        self._closing = threading.Event()
        self._directory = tempfile.TemporaryDirectory(prefix="standin-")
        self._notify_path = Path(self._directory.name) / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.bind(str(self._notify_path))
        self._notify.settimeout(0.1)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - outlives this method
        self._listener = _listen(attach_path) if attach_path is not None else None
        self._threads = [
            threading.Thread(target=self._hear, daemon=True),
            threading.Thread(target=self._supervise, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StandInSystemd {self.runs[-1:]} after {len(self.runs)} starts>"

    @property
    def pid(self) -> int:
        """Of the service's newest process."""
        return self.runs[-1].pid

    @property
    def output(self) -> str:
        """What all its processes have written to stdout and stderr."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    @property
    def stored_names(self) -> list[str]:
        """What the fd store holds."""
        with self._lock:
            return [name for name, _ in self._stored]

    def stored(self, name: str) -> list[int]:
        """Copies of the stored descriptors of that name, the caller's to close."""
        with self._lock:
            return [
                fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0) for n, fd in self._stored if n == name
            ]

    @contextlib.contextmanager
    def holding_restarts(self) -> Iterator[None]:
        """While it lasts nothing is started, so that something can be done in between."""
        with self._lock:
            yield

    def wait_ready(self, *, starts: int = 1, seconds: float = 30.0) -> Run:
        """The newest process, once it and so many starts are there and it serves.

        Raises RuntimeError with the service's output if that takes too long.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(self.runs) >= starts and self.runs[-1].ready:
                if self.runs[-1].exit_status is None:
                    return self.runs[-1]
            elif not self._threads[1].is_alive():
                break
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(f"the service did not become ready: {self!r}\n{self.output}")

    def wait_ended(self, run: Run, seconds: float = 30.0) -> int:
        """How a process ended. Raises RuntimeError if it does not."""
        deadline = time.monotonic() + seconds
        while run.exit_status is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service did not end: {run}\n{self.output}")
            time.sleep(_POLL_SECONDS)
        return run.exit_status

    def kill(self, number: int = signal.SIGKILL) -> Run:
        """Sends a signal to the service's process; which one that was."""
        run = self.runs[-1]
        if run.exit_status is None:
            os.kill(run.pid, number)
        return run

    def restart(self) -> Run:
        """``systemctl restart``: in order, and the fd store is kept; the process that ended."""
        self._once_more = True
        run = self.kill(signal.SIGTERM)
        self.wait_ended(run)
        return run

    def stop(self) -> None:
        """``systemctl stop``: in order; the fd store is given up. Twice is harmless."""
        self._wanted = False
        if self.runs:
            run = self.kill(signal.SIGTERM)
            try:
                self.wait_ended(run)
            except RuntimeError:
                self.kill()
                raise
        self._threads[1].join()
        with self._lock:
            while self._stored:
                os.close(self._stored.pop()[1])

    def close(self) -> None:
        """Stops the service and frees everything. Twice is harmless."""
        try:
            self.stop()
        finally:
            self._closing.set()
            self._threads[0].join()
            self._notify.close()
            if self._listener is not None:
                self._listener.close()
            self._output.close()
            self._directory.cleanup()

    # Processes

    def _supervise(self) -> None:
        while self._wanted:
            with self._lock:
                run = self._start()
                self.runs.append(run)
            self._attend(run)
            failed = run.exit_status != 0
            if not (failed and self._restarts) and not self._once_more:
                return
            self._once_more = False
            time.sleep(self._restart_seconds)

    def _start(self) -> Run:
        passed = [(ATTACH_NAME, self._listener.fileno())] if self._listener is not None else []
        passed += self._stored
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for _, fd in passed]
        environment = {**self._environment, "NOTIFY_SOCKET": str(self._notify_path)}
        if self._says_max and self.max_stored:
            environment["FDSTORE"] = str(self.max_stored)
        if self.watchdog_seconds is not None:
            environment["WATCHDOG_USEC"] = str(round(self.watchdog_seconds * 1e6))
        if passed:
            environment["LISTEN_FDS"] = str(len(passed))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        output = self._output.fileno()
        moves = [
            (output, 1),
            (output, 2),
            *((fd, i + FIRST_DESCRIPTOR) for i, fd in enumerate(copies)),
        ]
        try:
            pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _EXEC, *self.command],
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, old, new) for old, new in moves],
            )
        finally:
            for fd in copies:
                os.close(fd)
        return Run(pid)

    def _attend(self, run: Run) -> None:
        """Until the process has ended, which it does if it does not feed the watchdog."""
        while run.exit_status is None:
            pid, status = os.waitpid(run.pid, os.WNOHANG)
            if pid:
                run.exit_status = os.waitstatus_to_exitcode(status)
                return
            late = time.monotonic() - run.fed_at
            if self.watchdog_seconds is not None and run.ready and not run.stopping:
                if late > self.watchdog_seconds and not run.timed_out:
                    run.timed_out = True
                    os.kill(run.pid, signal.SIGABRT)
                    os.kill(run.pid, signal.SIGCONT)  # one that is stopped would not die of it
                elif late > self.watchdog_seconds + _ABORT_SECONDS:
                    os.kill(run.pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)

    # Notifications

    def _hear(self) -> None:
        room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS)
        while not self._closing.is_set():
            try:
                message, control, _, _ = self._notify.recvmsg(
                    1 << 16, room, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                continue
            sender, descriptors = 0, array("i")
            for level, kind, data in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
                elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    sender = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
            with self._lock:
                self._take_in(sender, message.decode(errors="replace"), list(descriptors))

    def _take_in(self, sender: int, message: str, descriptors: list[int]) -> None:
        fields = dict(line.split("=", 1) for line in message.splitlines() if "=" in line)
        run = next((run for run in reversed(self.runs) if run.pid == sender), None)
        kept: list[int] = []
        if run is not None:
            if fields.get("READY") == "1":
                run.ready, run.fed_at = True, time.monotonic()
            if fields.get("STOPPING") == "1":
                run.stopping = True
            if "STATUS" in fields:
                run.statuses.append(fields["STATUS"])
            if fields.get("WATCHDOG") == "1":
                run.num_alive, run.fed_at = run.num_alive + 1, time.monotonic()
            name = fields.get("FDNAME", "stored")
            if fields.get("FDSTORE") == "1":
                kept = [fd for fd in descriptors if self._store(name, fd)]
            if fields.get("FDSTOREREMOVE") == "1":
                self._remove(name)
        for fd in descriptors:  # a barrier's too: that is what its sender waits for
            if fd not in kept:
                os.close(fd)

    def _store(self, name: str, fd: int) -> bool:
        if len(self._stored) >= self.max_stored or any(_same(fd, old) for _, old in self._stored):
            return False
        self._stored.append((name, fd))
        return True

    def _remove(self, name: str) -> None:
        for each in [each for each in self._stored if each[0] == name]:
            self._stored.remove(each)
            os.close(each[1])


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(socket.SOMAXCONN)
    return listener


def _same(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


def main() -> int:
    """``python -m expertd_testing.standin_systemd ATTACH_SOCKET COMMAND...``, until Ctrl-C."""
    if len(sys.argv) < 3:
        sys.stderr.write(f"{main.__doc__}\n")
        return 2
    path, command = Path(sys.argv[1]), sys.argv[2:]
    path.unlink(missing_ok=True)
    with StandInSystemd(command, attach_path=path, watchdog_seconds=10.0) as systemd:
        shown = 0
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                output = systemd.output
                sys.stdout.write(output[shown:])
                sys.stdout.flush()
                shown = len(output)
                time.sleep(0.1)
    path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

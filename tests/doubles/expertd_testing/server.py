"""A real ``expert-run serve`` for tests, in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 30.0
_PASS_ON = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""
_LISTENS = re.compile(r"listening on (http\S+)")


class Server:
    """One ``expert-run serve`` process, at ``url``."""

    def __init__(
        self,
        arguments: Sequence[str],
        passed: socket.socket | None = None,
        *,
        fake_devices: bool = False,
    ) -> None:
        """``passed`` is given to the process as systemd gives a socket unit's.

        With ``fake_devices`` its engines may be on ``fake:0`` (:mod:`.expert_run`).
        """
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        command = [str(Path(sys.executable).with_name("expert-run"))]
        if fake_devices:
            command = [sys.executable, "-m", "expertd_testing.expert_run"]
        if passed is not None:
            command = [sys.executable, "-c", _PASS_ON, str(passed.fileno()), *command]
        # What clients leave with it is not for the user's own servers.
        self._state = tempfile.TemporaryDirectory()
        self.adapters = Path(self._state.name) / "adapters"
        """Where its adapters are."""
        self._process = subprocess.Popen(
            [*command, "serve", "--port", "0", *arguments],
            env={
                **os.environ,
                "XDG_STATE_HOME": self._state.name,
                "EXPERTD_ADAPTERS": str(self.adapters),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            pass_fds=() if passed is None else (passed.fileno(),),
        )
        self.url = ""
        self.greeting = ""
        """The line that says what is served, and where."""
        self._settled = threading.Event()
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the front."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """What it has said on stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")

    @property
    def engines(self) -> list[int]:
        """The processes of its engines: what its children forked."""
        return [pid for child in _children(self.pid) for pid in _children(child)]

    @property
    def descendants(self) -> list[int]:
        """All processes that it has started, and those that they have."""
        found = [self.pid]
        for pid in found:
            found += _children(pid)
        return found[1:]

    def wait_ready(self) -> None:
        """Until it listens. Raises RuntimeError with its log if it does not."""
        if not self._settled.wait(START_SECONDS) or not self.url:
            self._process.kill()
            raise RuntimeError(f"expert-run serve did not start:\n{self.log}")

    def signal(self, number: int) -> None:
        """Sends a signal to the front."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(STOP_SECONDS)

    def close(self) -> None:
        """Ends it in order if it will."""
        if self.returncode is None:
            self.signal(signal.SIGTERM)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"expert-run serve did not stop:\n{self.log}") from None
        finally:
            self._reader.join()
            self._stderr.close()
            self._state.cleanup()

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                if (found := _LISTENS.search(line)) is not None:
                    self.greeting, self.url = line.strip(), found[1]
                    self._settled.set()
        self._settled.set()


@contextmanager
def serving_http(
    *arguments: str | Path, passed: socket.socket | None = None, fake_devices: bool = False
) -> Iterator[Server]:
    """``expert-run serve`` with these arguments, on a free port, until the block ends."""
    server = Server([str(each) for each in arguments], passed, fake_devices=fake_devices)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found

"""``expert-run`` in a fork of a process that has imported torch, which takes seconds."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from expertd_inference.cli import main
from expertd_inference.process.fork_server import fork_context


class ForkedCommand:
    """What :class:`subprocess.Popen` is of the whole command, as far as tests need it."""

    def __init__(self, *arguments: str | Path, stdin: bytes = b"") -> None:
        """``stdin`` fits into a pipe."""
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = (
            Pipe(duplex=False) for _ in range(3)
        )
        theirs = (theirs_in, theirs_out, theirs_err)
        os.write(ours_in.fileno(), stdin)
        self.arguments = [*map(str, arguments)]
        self._process = fork_context().Process(target=_run, args=(self.arguments, theirs))
        self._process.start()
        for end in (*theirs, ours_in):
            end.close()
        self.stdout, self.stderr = (_as_file(end) for end in (ours_out, ours_err))

    @property
    def pid(self) -> int:
        """Of the fork."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        """What it says until its end. Raises TimeoutExpired if it says no more and goes on."""
        with ThreadPoolExecutor(2) as pool:
            stdout, stderr = pool.map(_rest_of, (self.stdout, self.stderr))
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return stdout, stderr


def _as_file(end: Connection) -> io.FileIO:
    file = io.FileIO(os.dup(end.fileno()))
    end.close()
    return file


def _rest_of(file: io.FileIO) -> bytes:
    if file.closed:
        return b""
    with file:
        return file.readall()


def _run(arguments: list[str], ends: Sequence[Connection]) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    sys.argv = ["expert-run", *arguments]
    main()

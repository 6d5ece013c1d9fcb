"""A real daemon for tests: ``expertd serve`` in a process and a directory of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 20.0


class Daemon:
    """One ``expertd serve`` process. ``socket`` is the directory that it serves in."""

    def __init__(
        self,
        models: Mapping[str, Path],
        *,
        ram: int | str,
        socket: Path,
        config: Path | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        module: str = "expertd",
    ) -> None:
        command = [sys.executable, "-m", module, "serve"]
        command += ["--socket", str(socket), "--ram", str(ram)]
        for name, pack in models.items():
            command += ["--model", f"{name}={pack}"]
        if config is not None:
            command += ["--config", str(config)]
        self.socket = socket
        # A file, not a pipe: nobody has to drain it, and it outlives the process.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **(environment or {})},
        )
        self._lines: deque[str] = deque(maxlen=1000)
        self._serving = False
        self._settled = threading.Event()
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()

    def __repr__(self) -> str:
        return f"<Daemon pid={self.pid} {self.socket} exit={self._process.poll()}>"

    @property
    def pid(self) -> int:
        """Of the process, also after its end."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    @property
    def stdout(self) -> str:
        """What the daemon has printed."""
        return "".join(self._lines)

    @property
    def stderr(self) -> str:
        """What the daemon has logged."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")

    def wait_ready(self, timeout_seconds: float = START_SECONDS) -> None:
        """Until it serves. Raises RuntimeError with its log if it ends or takes too long."""
        if not self._settled.wait(timeout_seconds) or not self._serving:
            self.kill()
            raise RuntimeError(f"expertd did not start:\n{self.stdout}{self.stderr}")

    def wait(self, timeout_seconds: float = STOP_SECONDS) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(timeout_seconds)

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it as a crash would; returns when it is gone."""
        self.signal(signal.SIGKILL)
        # One that was stopped with SIGSTOP dies of SIGKILL all the same.
        self._process.wait()

    def terminate(self, timeout_seconds: float = STOP_SECONDS) -> int:
        """Asks it to end in order; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_seconds)

    def close(self) -> None:
        """Ends it, in order if it will, and frees what this object holds."""
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"expertd did not stop:\n{self.stdout}{self.stderr}") from None
        finally:
            self._reader.join()
            self._stderr.close()

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._lines.append(line.decode(errors="replace"))
                if line.startswith(b"expertd"):
                    self._serving = True
                    self._settled.set()
        # At its end too, so that wait_ready does not wait for a daemon that failed.
        self._settled.set()


@contextmanager
def serving(
    models: Mapping[str, Path] | None = None,
    *,
    ram: int | str = 64 << 20,
    socket: Path | None = None,
    config: Path | None = None,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    module: str = "expertd",
) -> Iterator[Daemon]:
    """A daemon that serves ``models`` (name to pack) until the block ends.

    ``socket`` is a private temporary directory unless given; give that of another daemon
    to start its successor. Wherever the block ends, the process is gone.
    """
    # Not pytest's tmp_path: a Unix socket's path may have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="expertd-") as private:
        daemon = Daemon(
            models or {},
            ram=ram,
            socket=socket or Path(private) / "s",
            config=config,
            arguments=arguments,
            environment=environment,
            module=module,
        )
        try:
            daemon.wait_ready()
            yield daemon
        finally:
            daemon.close()

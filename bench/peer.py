"""A contestant in a process of its own: scripts of bench/peers, started and asked line by line.

Each script prints one JSON object when it is ready and one for each line that it reads; see
:mod:`bench.peers`. What it says on stderr is shown if it ends before its time.
"""

import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

SCRIPTS = Path(__file__).parent / "peers"
CONTEXT = 64
"""Tokens before those that are timed in decoding."""
_THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_")
_SECONDS = 300.0


class PeerError(Exception):
    """A peer that cannot be measured, in one sentence that says why."""


def clean_environment() -> dict[str, str]:
    """This process's, without what tells threads how to wait or Python where to import from.

    A worker of ours makes its threads sleep while they wait; a peer must find what it would find
    in a user's shell.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_THREADING) and name != "PYTHONPATH"
    }
    return kept | {"HF_HUB_OFFLINE": "1"}


class Peer:
    """``python bench/peers/SCRIPT run ARGUMENTS``; several can start at the same time.

    ``started`` is :func:`time.monotonic` before the process was, and ``ready`` what it said once
    :meth:`wait_ready` has returned; its times are of the same clock.
    """

    def __init__(
        self,
        script: str,
        arguments: Mapping[str, Any],
        *,
        python: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = script
        # A file, not a pipe: nobody has to drain it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [python, str(SCRIPTS / f"{script}.py"), "run", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=dict(clean_environment() if environment is None else environment),
        )
        self._left = b""
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> Self:
        """Until it can be asked. Raises PeerError if it ends instead."""
        self.ready = self.answer()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, line: str) -> None:
        """Asks; others can be asked before :meth:`answer` is called."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is found out, with its reason, by whoever waits for the answer

    def answer(self, seconds: float = _SECONDS) -> dict[str, Any]:
        """To the oldest line sent. Raises PeerError if the process ended or takes too long."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise PeerError(f"{self.name} gave no answer in {seconds:.0f} s.")
                more = os.read(self._process.stdout.fileno(), 1 << 16)
                if not more:
                    raise PeerError(f"{self.name} ended: {self._last_words()}")
                self._left += more
        line, _, self._left = self._left.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str, seconds: float = _SECONDS) -> dict[str, Any]:
        """What it answers to ``line``."""
        self.send(line)
        return self.answer(seconds)

    def decode(self, tokens: int) -> float:
        """Seconds for ``tokens`` tokens, one after the other, after a context of 64."""
        self.ask("clear 0")
        self.ask(f"prompt {CONTEXT}")
        return float(self.ask(f"decode {tokens}")["seconds"])

    def prompt(self, tokens: int) -> float:
        """Seconds for a prompt of ``tokens`` tokens and its last logits."""
        self.ask("clear 0")
        return float(self.ask(f"prompt {tokens}")["seconds"])

    def close(self) -> None:
        """Ends it; a second call does nothing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._stderr.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        size = os.fstat(self._stderr.fileno()).st_size
        said = os.pread(self._stderr.fileno(), size, 0).decode(errors="replace").strip()
        return said.splitlines()[-1] if said else f"exit code {code}."


def make_gguf(python: str, path: Path, config: Mapping[str, Any]) -> None:
    """Writes a model of that ``config.json`` for llama.cpp. Raises PeerError if it cannot be."""
    command = [python, str(SCRIPTS / "llama.py"), "make"]
    arguments = json.dumps({"path": str(path), "shape": config})
    try:
        done = subprocess.run(
            [*command, arguments],
            capture_output=True,
            text=True,
            check=False,
            env=clean_environment(),
        )
    except OSError as error:
        raise PeerError(f"llama.cpp: {python} cannot be run ({error.strerror}).") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PeerError(
            f"llama.cpp: {python} needs llama-cpp-python and gguf (docs/peers.md): {said[-1]}"
        )

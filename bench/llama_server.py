"""llama-server as a peer: llama.cpp's own server, with a model that bench/peers/llama.py writes."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peer import PeerError, clean_environment, make_gguf

START_SECONDS = 300.0
FLAGS = ("--no-kv-unified", "--cache-ram", "0", "--no-webui")
"""Its defaults are continuous batching, flash attention and weights repacked for its kernels.

With one KV memory for all slots it is up to a tenth slower, as each sequence passes over the keys
of all. Prompts are never asked twice: its cache of them in RAM would cost copies and find nothing.
"""


@dataclass(frozen=True)
class LlamaServer:
    """A process that serves."""

    pid: int
    url: str


@contextmanager
def llama_server(
    program: str,
    python: str,
    folder: Path,
    config: Mapping[str, Any],
    *,
    slots: int,
    tokens: int,
    threads: int,
    flags: Sequence[str] = FLAGS,
) -> Iterator[LlamaServer]:
    """``llama-server`` with a model of that ``config.json``, which ``python`` writes.

    It decodes ``slots`` sequences at once and has room for ``tokens`` of all together. Raises
    PeerError if it cannot be had.
    """
    if not (program and python):
        raise PeerError(
            "llama-server: --llama-server names no program of it, or --llama-python no interpreter "
            "that writes its model (docs/peers.md)."
        )
    gguf = folder / "model.gguf"
    make_gguf(python, gguf, config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "-m", str(gguf), "-t", str(threads), "-np", str(slots), "-c", str(tokens)]
    command += [*flags, "--host", "127.0.0.1", "--port", str(port)]
    log_path = folder / "llama.log"
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())
        except OSError as error:
            raise PeerError(f"llama-server cannot be run: {error.strerror}.") from error
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(url, process, log_path)
            yield LlamaServer(process.pid, url)
        finally:
            process.kill()
            process.wait()


def _wait_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    said = log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
    raise PeerError(f"llama-server did not start: {said[-1]}")

"""What records cost that are copied by Read instead of mapped.

Each way is measured in the same rounds as a copy within memory and parallel reads of the file, so
the ratios are what to read. It takes half a minute; ``--json`` prints one object instead of the
table::

    python -m bench.remote --json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme
from rich.console import Console
from rich.table import Table

from bench.cold import place, read_plainly
from bench.page_cache import write_out
from expertd_client import Client, TlsFiles
from expertd_testing.handmade import make_pack

LAYERS, EXPERTS = 6, 16
RECORD_BYTES = 1728 << 10  # about a 30B-A3B expert at 4 bit
ROUNDS = 5
GIB = 1 << 30


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expertd-bench-", dir=os.environ.get("TMPDIR")) as tmp:
        results = measure(Path(tmp))
    if arguments.json:
        print(json.dumps({"gib_per_second": results}, indent=1))
    else:
        show(results)


def measure(directory: Path) -> dict[str, float]:
    """GiB/s of each way, the median of the rounds."""
    pack = make_pack(directory / "pack", layers=LAYERS, experts=EXPERTS, record_bytes=RECORD_BYTES)
    write_out(pack)
    num_bytes = LAYERS * EXPERTS * RECORD_BYTES
    tls = certificates(directory)
    rounds: dict[str, list[float]] = {}
    memory = place(num_bytes)
    everything = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]

    def add(name: str, action: Callable[[], None]) -> None:
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        rounds.setdefault(name, []).append(num_bytes / GIB / seconds)

    with (
        daemon(directory, pack, num_bytes, tls) as address,
        Client(directory / "run") as unix,
        Client(address, tls=tls) as secured,
    ):
        clients = {"unix socket": unix, "loopback TLS": secured}

        def read(client: Client) -> None:
            for _ in client.read("m", everything):
                pass

        for _ in range(ROUNDS):
            for name, client in clients.items():
                add(f"{name}, from disk", lambda client=client: read(client))
            add("preadv", lambda: read_plainly(pack, RECORD_BYTES, memory))
        with unix.attach("m") as session:
            for layer in range(LAYERS):
                session.acquire(layer, range(EXPERTS)).release()
        source = bytes(RECORD_BYTES)
        for _ in range(ROUNDS):
            for name, client in clients.items():
                add(f"{name}, from RAM", lambda client=client: read(client))
            add("memcpy", lambda: copy(source, LAYERS * EXPERTS))
    return {name: statistics.median(figures) for name, figures in rounds.items()}


def copy(source: bytes, times: int) -> None:
    """As many records, one after the other, from memory to memory."""
    target = bytearray(len(source))
    for _ in range(times):
        target[:] = source


def certificates(directory: Path) -> TlsFiles:
    """An authority, and one certificate that is both sides'."""
    authority = trustme.CA()
    files = TlsFiles(directory / "ca.pem", directory / "both.pem", directory / "both.key")
    issued = authority.issue_cert("127.0.0.1", "bench")
    authority.cert_pem.write_to_path(str(files.ca))
    issued.cert_chain_pems[0].write_to_path(str(files.certificate))
    issued.private_key_pem.write_to_path(str(files.key))
    return files


@contextmanager
def daemon(directory: Path, pack: Path, ram: int, tls: TlsFiles) -> Iterator[str]:
    """A daemon with room for the whole pack; its TCP address."""
    config = directory / "expertd.toml"
    config.write_text(
        f"""[tcp]
listen = "127.0.0.1:0"
certificate = "{tls.certificate}"
key = "{tls.key}"
client_ca = "{tls.ca}"
allowed_names = ["bench"]
"""
    )
    command = [sys.executable, "-m", "expertd", "serve", "--config", str(config)]
    command += ["--socket", str(directory / "run"), "--ram", str(ram), "--model", f"m={pack}"]
    log = directory / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield "tcp://" + log.read_text().partition("tcp=")[2].split()[0]
    finally:
        process.terminate()
        process.wait()


def show(results: dict[str, float]) -> None:
    """As a table."""
    table = Table(title="records copied by Read", title_justify="left")
    for column in ("way", "GiB/s", "of its limit"):
        table.add_column(column)
    for name, figure in results.items():
        limit = "memcpy" if "RAM" in name else "preadv"
        share = "" if name in ("memcpy", "preadv") else f"{figure / results[limit]:.2f} of {limit}"
        table.add_row(name, f"{figure:.2f}", share)
    Console().print(table)


if __name__ == "__main__":
    main()

"""What the store costs on this host: a hit, a call, a cold read. Run it with ``make bench``.

Each figure stands beside its limit, measured in the same seconds: machines differ and drift,
so the ratios are what to read. ``--json`` prints one object instead of the table.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from expertd.handshake import Role, rpc_target
from expertd.session_page import SessionPage
from expertd_client import Client, Session
from tests.handmade import make_pack

LAYERS, EXPERTS, TOP_K = 12, 16, 8
RECORD_BYTES = 1728 << 10  # about a 30B-A3B expert at 4 bit
ROUNDS = 5
READERS = 4  # as many as the daemon has loader threads


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expertd-bench-", dir=os.environ.get("TMPDIR")) as tmp:
        pack = make_pack(
            Path(tmp) / "pack",
            layers=LAYERS,
            experts=EXPERTS,
            experts_per_token=TOP_K,
            record_bytes=RECORD_BYTES,
        )
        os.sync()
        num_bytes = LAYERS * EXPERTS * RECORD_BYTES
        with daemon(Path(tmp) / "run", pack, num_bytes) as socket:
            results = {
                "cold_read": measure_cold(socket, pack, num_bytes),
                "hit": measure_hit(socket),
                "call": measure_call(socket),
            }
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


@contextmanager
def daemon(socket: Path, pack: Path, ram: int) -> Iterator[Path]:
    """A daemon with room for the whole pack."""
    command = [sys.executable, "-m", "expertd", "serve", "--socket", str(socket)]
    process = subprocess.Popen(
        [*command, "--ram", str(ram), "--model", f"m={pack}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield socket
    finally:
        process.terminate()
        process.wait()


def measure_hit(socket: Path) -> dict[str, float]:
    """Looking up, holding and releasing 8 resident experts of a layer, touches included."""
    with Client(socket) as store, store.attach("m") as session:
        warm(session)
        experts = list(range(TOP_K))

        def hit() -> None:
            session.acquire(3, experts).release()

        calls = 2000
        return {"us_per_layer": 1e6 * median(lambda: timed(hit, calls)) / calls}


def measure_call(socket: Path) -> dict[str, float]:
    """A Fetch of 8 resident experts beside the emptiest call there is, a health check."""
    from expertd.greeting import handshake
    from expertstore.v1 import expert_store_pb2 as pb
    from expertstore.v1 import expert_store_pb2_grpc as rpc

    calls = 200
    with (
        handshake(socket, Role.WORKER, "m", 5.0) as greeting,
        grpc.insecure_channel(rpc_target(socket)) as channel,
    ):
        store = rpc.ExpertStoreStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        experts = [pb.ExpertRef(layer=3, expert=expert) for expert in range(TOP_K)]
        page = SessionPage(
            memoryview(mmap.mmap(greeting.descriptors[2], greeting.welcome.page_bytes))
        )
        number = 0

        def fetch() -> None:
            nonlocal number
            number += 1
            request = pb.FetchRequest(experts=experts, fetch_number=number)
            store.Fetch(request, metadata=greeting.credentials)
            page.released_fetch = number

        def echo() -> None:
            health.Check(health_pb2.HealthCheckRequest())

        pairs = [(timed(fetch, calls), timed(echo, calls)) for _ in range(ROUNDS)]
    return {
        "fetch_us": 1e6 * statistics.median(fetched for fetched, _ in pairs) / calls,
        "echo_us": 1e6 * statistics.median(echoed for _, echoed in pairs) / calls,
        "ratio": statistics.median(fetched / echoed for fetched, echoed in pairs),
    }


def measure_cold(socket: Path, pack: Path, num_bytes: int) -> dict[str, float]:
    """Fetching all records from disk beside plain parallel reads of the same file."""
    ours, plain = [], []
    for _ in range(ROUNDS):
        with Client(socket) as store:
            store.unload_model("m")
            store.load_model("m", pack)
            with store.attach("m") as session:
                ours.append(timed(lambda session=session: warm(session)))
        plain.append(timed(lambda: read_plainly(pack)))
    gib = num_bytes / (1 << 30)
    return {
        "fetch_gib_per_second": gib / statistics.median(ours),
        "preadv_gib_per_second": gib / statistics.median(plain),
        "ratio": statistics.median(b / a for a, b in zip(ours, plain, strict=True)),
    }


def warm(session: Session) -> None:
    """Makes every expert resident, a layer at a time."""
    for layer in range(LAYERS):
        for lease in session.waves(layer, range(EXPERTS)):
            lease.release()


def read_plainly(pack: Path) -> None:
    """All records with as many threads as the daemon has, past the page cache."""
    file = os.open(pack / "experts-00000.safetensors", os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(file).st_size
    buffers = [mmap.mmap(-1, RECORD_BYTES) for _ in range(READERS)]

    def read(reader: int) -> None:
        for offset in range(4096 + reader * RECORD_BYTES, size, READERS * RECORD_BYTES):
            os.preadv(file, [buffers[reader]], offset)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    os.close(file)


def timed(action: Callable[[], None], calls: int = 1) -> float:
    """Seconds that ``calls`` of it take."""
    started = time.perf_counter()
    for _ in range(calls):
        action()
    return time.perf_counter() - started


def median(measure: Callable[[], float]) -> float:
    """Of several rounds."""
    return statistics.median(measure() for _ in range(ROUNDS))


def show(results: dict[str, Any]) -> None:
    """As a table."""
    table = Table(title="the store on this host", title_justify="left")
    for column in ("what", "ours", "its limit", "ratio"):
        table.add_column(column)
    hit, call, cold = results["hit"], results["call"], results["cold_read"]
    table.add_row("look up, hold, release 8 experts", f"{hit['us_per_layer']:.1f} us", "", "")
    table.add_row(
        "Fetch of 8 resident experts",
        f"{call['fetch_us']:.0f} us",
        f"empty call {call['echo_us']:.0f} us",
        f"{call['ratio']:.2f} x",
    )
    table.add_row(
        "cold fetch, checksums included",
        f"{cold['fetch_gib_per_second']:.2f} GiB/s",
        f"plain preadv {cold['preadv_gib_per_second']:.2f} GiB/s",
        f"{cold['ratio']:.2f} of it",
    )
    Console().print(table)


if __name__ == "__main__":
    main()

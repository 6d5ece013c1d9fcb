"""Part 4: a Fetch of resident experts beside the emptiest call that grpc.aio can serve."""

import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from bench.echo import METHOD
from bench.figures import Bench, Figure, compared
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role, rpc_target
from expertstore.shared.session_page import SessionPage
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

_TOP_K = 8


def measure(bench: Bench) -> Iterator[Figure]:
    """Latencies of both, a hundred of one and a hundred of the other, in turns."""
    bench.say("calls: an echo server and a daemon")
    pack = make_pack(bench.folder / "calls", layers=4, experts=64)
    echo_socket = bench.folder / "echo.sock"
    with (
        serving({"m": pack}, ram=64 << 20, socket=bench.folder / "calls-s") as daemon,
        echoing(echo_socket),
        handshake(daemon.socket, Role.WORKER, "m", 5.0) as greeting,
        grpc.insecure_channel(rpc_target(daemon.socket)) as channel,
        grpc.insecure_channel(f"unix:{echo_socket}") as echo_channel,
    ):
        store = rpc.ExpertStoreStub(channel)
        call = echo_channel.unary_unary(METHOD)
        page = SessionPage(
            memoryview(mmap.mmap(greeting.descriptors[2], greeting.welcome.page_bytes))
        )
        experts = [pb.ExpertRef(layer=3, expert=expert) for expert in range(_TOP_K)]
        number = 0

        def fetch() -> None:
            nonlocal number
            number += 1
            request = pb.FetchRequest(experts=experts, fetch_number=number)
            store.Fetch(request, metadata=greeting.credentials)
            page.released_fetch = number

        def echo() -> None:
            call(b"")

        calls = 100 if bench.rounds > 1 else 10
        latency_us(fetch, calls)
        latency_us(echo, calls)
        turns = []
        for turn in range(3 * bench.rounds):
            bench.say(f"calls: {turn + 1} of {3 * bench.rounds}")
            turns.append((latency_us(fetch, calls), latency_us(echo, calls)))
        what = f"Fetch of {_TOP_K} resident experts / empty grpc.aio echo"
        yield compared("calls", what, "us", turns, at_most=1.5)


@contextmanager
def echoing(socket: Path) -> Iterator[None]:
    """An echo server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.echo", str(socket)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def latency_us(call: Callable[[], None], calls: int) -> float:
    """The median of ``calls`` calls, one after the other."""
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds)

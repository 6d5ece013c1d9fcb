"""Part 4: the hit path alone and in a crowd, and what the daemon does meanwhile."""

import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import Bench, Figure, compared, counted, timed
from expertd_client import Client, Session
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack

LAYERS, EXPERTS, TOP_K = 48, 128, 8  # a 30B-A3B's
OTHERS = 15
TOKENS_PER_SECOND = 20
_BURST = 200  # look-ups: 1 ms, which a switch to another process seldom hits


def measure(bench: Bench) -> Iterator[Figure]:
    """One worker, then the same with 15 others at 20 tokens a second each, in turns."""
    bench.say("hits: a pack, a daemon and 16 workers")
    pack = make_pack(
        bench.folder / "hits", layers=LAYERS, experts=EXPERTS, experts_per_token=TOP_K,
        record_bytes=8 << 10,
    )  # fmt: skip
    ram = LAYERS * EXPERTS * (8 << 10)
    with (
        serving({"m": pack}, ram=ram, socket=bench.folder / "hits-s") as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as session,
    ):
        for layer in range(LAYERS):
            session.acquire(layer, range(EXPERTS)).release()
        alone = [hit_us(session) for _ in range(20 * bench.rounds)]
        what = "looking up, holding, releasing 8 experts"
        yield counted("hits", what, "us", alone, at_most=5.0)
        with crowd(daemon.socket) as workers:
            middle, slow = [], []
            for turn in range(bench.rounds):
                bench.say(f"hits: in a crowd, {turn + 1} of {bench.rounds}")
                _signal(workers, signal.SIGSTOP)
                still = _bursts(session, bench.seconds / bench.rounds / 2)
                _signal(workers, signal.SIGCONT)
                busy = _bursts(session, bench.seconds / bench.rounds)
                middle.append((statistics.median(busy), statistics.median(still)))
                slow.append((_p99(busy), _p99(still)))
            bench.say(f"hits: the daemon, for {bench.seconds:g} s")
            used, began = cpu_seconds(daemon.pid), time.monotonic()
            generate(session, bench.seconds)
            share = (cpu_seconds(daemon.pid) - used) / (time.monotonic() - began)
        name = f"CPU time of a hit, {OTHERS} others running / stopped"
        yield compared("hits", f"{name}, median", "us", middle, at_most=1.1)
        yield compared("hits", f"{name}, 99th of 100", "us", slow)
        what = f"daemon with {1 + OTHERS} workers at {TOKENS_PER_SECOND} tokens/s"
        yield counted("hits", what, "% of a core", [100 * share], at_most=5.0)


def hit_us(session: Session) -> float:
    """Microseconds of one look-up."""
    experts = list(range(TOP_K))
    return 1e6 * timed(lambda: session.acquire(3, experts).release(), _BURST)


def _bursts(session: Session, seconds: float) -> list[float]:
    """CPU microseconds of a look-up, in bursts like a token's."""
    experts, results = list(range(TOP_K)), []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(results) < 3:
        began = time.thread_time()
        for _ in range(_BURST):
            session.acquire(3, experts).release()
        results.append(1e6 * (time.thread_time() - began) / _BURST)
        time.sleep(0.01)
    return results


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


@contextmanager
def crowd(socket: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers in processes of their own, all attached and at work."""
    command = [sys.executable, "-m", "bench.hits", str(socket)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(OTHERS)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()


def _signal(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        worker.send_signal(number)
    time.sleep(0.1)


def cpu_seconds(pid: int) -> float:
    """What the process has used so far, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generate(session: Session, seconds: float) -> None:
    """What a worker does that only hits: every layer, so many times a second."""
    experts, due = list(range(TOP_K)), time.monotonic()
    end = due + seconds
    while due < end:
        for layer in range(LAYERS):
            session.acquire(layer, experts).release()
        due = max(due + 1 / TOKENS_PER_SECOND, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def work(socket: Path) -> None:
    """A worker of the crowd, until it is ended."""
    with Client(socket) as store, store.attach("m") as session:
        print("attached", flush=True)
        generate(session, math.inf)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
